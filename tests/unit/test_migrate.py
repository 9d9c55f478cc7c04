"""Configurations of the replaced systems, written as their guides show them, become configs that train."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from omniloom.config import keys_of, load_config
from omniloom.run.trainer import run
from omniloom.tools.migrate.draft import read_rules
from omniloom.tools.migrate.readers import READERS
from omniloom.tools.migrate.shell import is_open, read_script
from omniloom.tools.migrate.write import MigrateError, migrate
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines

SCRIPT = r"""#!/bin/bash
source /usr/local/Ascend/ascend-toolkit/set_env.sh
export TASK_QUEUE_ENABLE=2
export HCCL_CONNECT_TIMEOUT=1200
NPUS_PER_NODE=2
MASTER_ADDR=<master_ip_address> # of the first node
NNODES=1
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
MM_DATA="./data.json"
MM_MODEL="./model.json"
LOAD_PATH="ckpt/convert_path/Model"
SAVE_PATH="save_dir"
FSDP2_PATH="./fsdp2_config.yaml"
TP=1
CP=1
MBS=1
GRAD_ACC_STEP=2
DP=$(($WORLD_SIZE/$TP/$CP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))
DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES
"
GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size ${CP} \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --vocab-size 152064 \
    --seq-length 512 \
    --lr 1.0e-5 \
    --lr-decay-style cosine \
    --weight-decay 0 \
    --train-iters 2 \
    --lr-warmup-fraction 0.5 \
    --clip-grad 0.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --seed 1234 \
    --load $LOAD_PATH \
    --no-load-optim \  # the optimizer's states are not loaded; remove it to load them
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --num-workers 0 \
    --fsdp2-config-path $FSDP2_PATH \
    --distributed-timeout-minutes 60 \
"
MM_ARGS="
    --mm-data $MM_DATA \
    --mm-model $MM_MODEL \
    --mm-tool ./mindspeed_mm/tools/tools.json
"
OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 5000 \
    --eval-interval 10000 \
    --save $SAVE_PATH \
"
logfile=$(date +%Y%m%d)_$(date +%H%M%S)
torchrun $DISTRIBUTED_ARGS pretrain_transformers.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    2>&1 | tee logs/train_${logfile}.log
STEP_TIME=`grep "elapsed" logs/train_${logfile}.log | awk -F ':' '{print$5}'`
"""
PATCH_SCRIPT = """#!/bin/bash
set -e
NUM_NODES=${WORLD_SIZE:-1}
GPUS_PER_NODE=${KUBERNETES_CONTAINER_RESOURCE_GPU:-$(python -c "import torch; print(torch.cuda.device_count())")}
DISTRIBUTED_ARGS=(
    --nnodes $NUM_NODES
    --nproc_per_node $GPUS_PER_NODE
)
TP=4
PP=4
EP=4
SEQ_LEN=512
TRAIN_DATA_PATH=${rows}
VALID_DATA_PATH=${rows}
MODEL_ARGS=(
    --num-layers 48
    --moe-aux-loss-coeff 0.001
    --moe-layer-freq "'([1]*48)'"
    --seq-length ${SEQ_LEN}
)
TRAINING_ARGS=(
    --load ckpt/Model-to-mcore
    --micro-batch-size 1
    --global-batch-size 2
    --train-iters 2
    --lr 6.0e-5
    --min-lr 6.0e-6
    --lr-warmup-iters 1
    --lr-decay-iters 450
    --train-data-path ${TRAIN_DATA_PATH}
    --valid-data-path ${VALID_DATA_PATH}
    --split 90,10,0
    --num-workers 0
    --exit-duration-in-mins 220
)
INFRA_ARGS=(
    --tensor-model-parallel-size ${TP}
    --pipeline-model-parallel-size ${PP}
    --expert-model-parallel-size ${EP}
    --recompute-granularity selective
)
cmd="torchrun ${DISTRIBUTED_ARGS[@]} pretrain_qwen.py \\
    ${MODEL_ARGS[@]} \\
    ${TRAINING_ARGS[@]} \\
    ${INFRA_ARGS[@]}"
eval $cmd 2>&1 | tee run.log ; exit ${PIPESTATUS[0]}
"""


def data_json(model: str, **basic: object) -> dict:
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": model, "use_fast_tokenizer": True, "image_max_pixels": 16384,
                "image_min_pixels": 0, "video_fps": 2.0, "video_maxlen": 16, "audio_sampling_rate": 16000,
            },
            "basic_parameters": {
                "template": "qwen2_omni", "dataset_dir": "./data", "dataset": "./data/rows.json",
                "cache_dir": "./data/cache_dir", "train_on_prompt": False, "mask_history": False, **basic,
            },
            "attr": {
                "system": None, "images": None, "messages": "messages", "role_tag": "role", "content_tag": "content",
                "user_tag": "user", "assistant_tag": "assistant", "observation_tag": None,
            },
        },
        "dataloader_param": {"dataloader_mode": "sampler", "drop_last": True, "shuffle": True},
    }  # fmt: skip


def model_json(model: str, *, model_id: str = "qwen3_omni_moe", **text: object) -> dict:
    return {
        "model_id": model_id,
        "init_from_hf_path": model,
        "image_encoder": {
            "vision_encoder": {"num_layers": 32, "freeze": True, "attn_implementation": "flash_attention_2"},
            "vision_projector": {"model_id": "lnmlp", "freeze": False},
            "tp": 1, "pp": 1,
        },
        "text_decoder": {"num_layers": 28, "freeze": False, "attn_layout": "TND", **text},
        "loss_cfg": {"compute_mode": "dynamic_chunk", "chunk_size": 4096},
    }  # fmt: skip


NEWER = {  # the single YAML of the later guides
    "parallel": {"tensor_parallel_size": 1, "fully_shard_parallel_size": "auto", "ulysses_parallel_size": 1,
                 "fsdp_plan": {"apply_modules": ["model.layers.{*}"], "param_dtype": "bf16"}},
    "data": data_json("ckpt/Model", cutoff_len=512),
    "model": {"model_id": "qwen3_vl", "model_name_or_path": "ckpt/Model", "freeze": ["model.visual"]},
    "features": {"loss_cfg": {"loss_type": "default"}, "recompute": True,
                 "recompute_plan": {"apply_modules": ["model.language_model.layers.{*}"]}},
    "training": {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 42, "lr": 1.0e-5,
                 "lr_decay_style": "cosine", "lr_warmup_ratio": 0.5, "train_iters": 2, "clip_grad": 0.0,
                 "save": "save_dir", "plugin": ["mindspeed_mm/fsdp/models/qwen3vl"]},
    "tools": {"profile": {"enable": False, "static_param": {"start_step": 10, "end_step": 11}}},
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guides lay it out, and the one from which their commands are given."""
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(40)
    ]
    (tmp_path / "data/rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(files: dict[str, object]) -> list[str]:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        Path(name).write_text(yaml.safe_dump(content, sort_keys=False) if name.endswith("yaml") else text)
    return list(files)


GUIDES = {
    "qwen3_omni_first": ("qwen3_omni", {"data.json": data_json("ckpt/Model"), "model.json": model_json("ckpt/Model"),
                                        "fsdp2_config.yaml": {"sharding_size": "auto"}, "finetune.sh": SCRIPT}),
    "qwen3_omni_later": ("qwen3_omni", {"data.json": data_json("ckpt/Model", streaming=True),
                                        "model.json": model_json("ckpt/Model", activation_offload=True),
                                        "fsdp2_config.yaml": {"sharding_size": "auto"},
                                        "finetune.sh": SCRIPT.replace("CP=1", "CP=1 # Ulysses")}),
    "qwen2_5_omni": ("qwen2_5_omni", {"data.json": data_json("ckpt/Model"),
                                      "model.json": model_json("ckpt/Model", model_id="qwen2_5vl", tp=4,
                                                               pipeline_num_layers=[11, 17]),
                                      "fsdp2_config.yaml": {"sharding_size": "auto"},
                                      "finetune.sh": SCRIPT.replace("--no-save-rng", "--hetero-parallel")}),
    "qwen3_vl": ("qwen3_vl", {"qwen3vl_config.yaml": NEWER}),
    "qwen3_omni_megatron_patch": ("qwen3_omni", {"run_mcore.sh": PATCH_SCRIPT}),
}  # fmt: skip


@pytest.mark.parametrize("guide", GUIDES)
def test_the_files_of_every_guide_give_a_config_that_trains(guide: str, project: Path) -> None:
    family, files = GUIDES[guide]
    make_tiny(family, Path("ckpt/Model"), num_words=300)
    words = write(files)
    text = migrate([*words, *(["rows=data/rows.json"] if "patch" in guide else [])])
    tree = yaml.safe_load(text)
    for degree in ("expert", "tensor", "pipeline"):  # one rank here, where they had sixteen
        tree.get("parallel", {}).pop(degree, None)
    tree["model"]["dtype"] = "float32"
    tree["data"] |= {"pack_tokens": 256, "workers": 0}
    tree["checkpoint"] = {"export": False}
    assert run(load_config(tree)) == 0
    run_dir = Path(tree["train"].get("run_dir", "runs/train"))
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == [0, 1]


def test_a_ring_and_ulysses_beside_it_are_kept(project: Path) -> None:
    newer = {**NEWER, "parallel": {"ring_attention_size": 2, "ulysses_parallel_size": 4}}
    assert yaml.safe_load(migrate(write({"config.yaml": newer})))["parallel"] == {"context": {"ring": 2, "ulysses": 4}}
    newer["parallel"] = {"ring_attention_size": 1, "ulysses_parallel_size": 4}
    assert yaml.safe_load(migrate(write({"config.yaml": newer})))["parallel"] == {"context": 4}


def test_a_list_of_layers_by_stage_is_kept(project: Path) -> None:
    files = {**GUIDES["qwen2_5_omni"][1]}
    tree = yaml.safe_load(migrate(write(files)))
    assert tree["parallel"]["tensor"] == 4
    assert "pipeline_layers" not in tree["parallel"]  # of a pipeline that is off
    files["finetune.sh"] = SCRIPT.replace("pipeline-model-parallel-size 1", "pipeline-model-parallel-size 2")
    tree = yaml.safe_load(migrate(write(files)))
    assert tree["parallel"]["pipeline_layers"] == [11, 17]


def test_ranks_that_share_a_sample_are_counted_once(project: Path) -> None:
    flags = "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --micro-batch-size 3 --train-iters 1"
    tree = yaml.safe_load(migrate(write({"run.sh": f"torchrun --nproc_per_node 16 pretrain.py {flags}\n"})))
    assert tree["train"]["packs_per_step"] == 6


def test_every_line_says_where_it_came_from(project: Path) -> None:
    text = migrate(write(GUIDES["qwen3_omni_first"][1]))
    body = text.split("\n# No counterpart")[0].split("\n# Not needed")[0]
    values = [line for line in body.splitlines()[1:] if re.search(r": \S", line) and not line.startswith("#")]
    assert all(re.search(r"  # (\S+\.(json|yaml|sh): |Megatron)", line) for line in values), values
    tree = yaml.safe_load(text)
    assert tree["train"]["packs_per_step"] == 4  # GBS = MBS x GRAD_ACC_STEP x DP, DP = WORLD_SIZE / TP / CP
    assert tree["train"]["warmup_steps"] == 1
    assert tree["train"]["betas"] == [0.9, 0.999]
    assert tree["train"]["loss"] == "batch"
    assert tree["policy"] == {
        "vision": {"freeze": True}, "vision.merger": {"freeze": False}, "vision.deepstack": {"freeze": False},
        "text": {"freeze": False},
    }  # fmt: skip
    assert tree["checkpoint"]["load_optimizer"] is False
    assert tree["data"]["image"] == {"max_pixels": 16384, "min_pixels": None}


def test_no_setting_is_dropped_in_silence(project: Path) -> None:
    files = {**GUIDES["qwen3_omni_first"][1]}
    files["model.json"] = {**model_json("ckpt/Model"), "some_new_switch": 3}
    text = migrate(write(files))
    for flag in re.findall(r"(--[a-z0-9-]+)", SCRIPT):
        if flag not in ("--mm-data", "--mm-model", "--mm-tool", "--fsdp2-config-path"):
            assert flag in text, flag
    assert "some_new_switch 3: not known to migrate" in text


def test_a_script_alone_finds_the_files_that_it_names(project: Path) -> None:
    write(GUIDES["qwen3_omni_first"][1])
    assert yaml.safe_load(migrate(["finetune.sh"]))["model"]["path"] == "ckpt/Model"


def test_two_values_for_one_key_name_both_places(project: Path) -> None:
    files = {**GUIDES["qwen3_omni_first"][1], "model.json": model_json("ckpt/Other")}
    with pytest.raises(MigrateError, match=r"data\.json: .*model_name_or_path and model\.json: init_from_hf_path"):
        migrate(write(files))


def test_what_only_a_shell_could_tell_is_asked_for(project: Path) -> None:
    words = write({"run_mcore.sh": PATCH_SCRIPT})
    with pytest.raises(MigrateError, match=r"--train-data-path.*\$\{rows\}.*NAME=VALUE[\s\S]*learning_rate: 6\.0e-05"):
        migrate(words)
    tree = yaml.safe_load(migrate([*words, "rows=data/rows.json"]))
    assert tree["model"]["path"] == "ckpt/Model"
    assert tree["data"]["split"] == 0.1
    assert tree["parallel"] == {"tensor": 4, "pipeline": 4, "expert": 4}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"x": 1}', "are of none"),
        ("a.json", "[1]", "got a list"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "", "got nothing"),
        ("a.yaml", "a:\n\t- b", "not valid YAML: .* line 2"),
        ("a.sh", "torchrun x.py --train-iters 3 --lr abc", "--lr: expected a number, got 'abc'"),
        ("a.sh", "echo hello", "starts no training"),
        ("a.sh", "torchrun --nproc_per_node 2 x.py --fp16 --train-iters 3", "fp16 is not offered"),
        ("a.sh", "torchrun x.py --train-iters 3 --lr-decay-style WSD", "expected one of cosine, linear, constant"),
        ("a.sh", "swift sft --model m --dataset AI-ModelScope/set", "a name on a hub"),
        (
            "a.sh",
            "swift sft --model m --dataset a.jsonl --task_type embedding",
            "--task_type: embedding is not offered",
        ),
        ("a.sh", "swift rlhf --rlhf_type dpo --model m --dataset a.jsonl", "swift rlhf is not offered; swift sft is"),
        ("a.sh", "python swift/cli/_megatron/pt.py --model m --dataset a.jsonl", "swift pt is not offered"),
        (
            "a.sh",
            "torchrun qwenvl/train/train_qwen.py --model_name_or_path m --tune_mm_llm True --learning_rate 2e-7",
            r"2 settings \(a.sh: --tune_mm_llm, a.sh: --learning_rate, ...\) are not known, more than are",
        ),
        ("a.sh", "torchrun x.py --train-iters $STEPS", r"--train-iters: expected a value .*give NAME=VALUE"),
    ],
)
def test_files_that_are_no_such_configuration_are_refused(name: str, text: str, message: str, project: Path) -> None:
    Path(name).write_text(text)
    with pytest.raises(MigrateError, match=message):
        migrate([name])


def test_llama_factory_files_name_their_rows_by_dataset_info(project: Path) -> None:
    info = {"mine": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
                     "tags": {"role_tag": "role", "content_tag": "content"}}}  # fmt: skip
    sft = {"model_name_or_path": "Qwen/Qwen2.5-Omni-7B", "stage": "sft", "finetuning_type": "lora", "lora_rank": 8,
           "lora_target": "all", "dataset": "mine", "dataset_dir": "data", "cutoff_len": 2048, "learning_rate": 1e-4,
           "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 2,
           "plot_loss": True, "neat_packing": True}  # fmt: skip
    write({"sft.yaml": sft, "data/dataset_info.json": info})
    tree = yaml.safe_load(migrate(["sft.yaml"]))
    assert tree["data"]["train"] == ["data/rows.json"]
    assert tree["policy"]["text"]["lora"] == {"rank": 8, "alpha": 16.0, "dropout": 0.0}
    assert tree["policy"]["audio"] == {"freeze": True}
    assert tree["train"]["schedule"] == "linear"
    assert tree["train"]["epochs"] == 2.0
    write({"data/dataset_info.json": {"other": info["mine"]}})
    with pytest.raises(MigrateError, match="has no such entry"):
        migrate(["sft.yaml", "data/dataset_info.json"])


def test_what_is_frozen_is_a_whole_component_and_parts_of_one_are_listed(project: Path) -> None:
    newer = {**NEWER, "model": {**NEWER["model"], "freeze": ["model.visual.merger", "model.visual.blocks"]}}
    text = migrate(write({"config.yaml": newer}))
    assert yaml.safe_load(text)["policy"] == {"text": {"recompute": True}, "vision.merger": {"freeze": True}}
    assert "model.freeze visual.blocks: parts of a component cannot be frozen alone" in text


def test_a_swift_command_line_is_read_with_the_variables_before_it(project: Path) -> None:
    command = r"""MAX_PIXELS=1003520 \
NPROC_PER_NODE=4 \
swift sft --model Qwen/Qwen2.5-Omni-7B --dataset 'data/rows.json#20' --train_type lora --lora_alpha 32 \
    --target_modules q_proj v_proj --max_length 2048 --learning_rate 1e-4 --deepspeed zero2
"""
    tree = yaml.safe_load(migrate(write({"run.sh": command})))
    assert tree["data"]["max_samples"] == 20
    assert tree["data"]["image"]["max_pixels"] == 1003520
    assert tree["train"]["packs_per_step"] == 16  # its default: sixteen samples a step on all devices
    assert tree["policy"]["text"]["lora"]["modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('A=2\nB="$((A * 3 + 1)) ${A}x"\nrun --b "$B" --d=\'$A\'', {"b": "7 2x", "d": "$A"}),
        ('C=(--one 1 --two "a b")\nrun ${C[@]}', {"one": "1", "two": "a b"}),
        ('C=(\n  --one 1  # first\n  # --off\n)\nC+=(--two 2)\nrun "${C[@]}"', {"one": "1", "two": "2"}),
        ("C=()\nA=5\nrun --a $A ${C[@]}", {"a": "5"}),
        ('S="--one 1"\nS="$S --two 2"\nS+=" --three 3"\nrun $S', {"one": "1", "two": "2", "three": "3"}),
        ("run --d ${D:-dflt} --n $((${N:-8} * 2)) --f $(hostname)", {"d": "dflt", "n": "16", "f": "$(hostname)"}),
        (": ${LR:=3}\nR=${LR:+--resume x}\nrun --lr $LR $R ${NO:+--no}", {"lr": "3", "resume": "x"}),
        ("G=(0 1 2)\nrun --n ${#G[@]} --m ${1:-base}", {"n": "3", "m": "base"}),
        ("A=2\nif [ $A = 3 ]; then\n  A=9\nfi\nrun --a $A", {"a": "$A"}),  # set in a branch
        ("A=2\n[ -z $A ] && A=9\nexport B=1 && export C=2\nrun --a $A --c $C", {"a": "$A", "c": "2"}),
        ("A=2\ncase $1 in\n big) A=9 ;;\nesac\nrun --a $A", {"a": "$A"}),
        ("function f {\n  A=9\n}\ng()\n{\n  A=8\n}\nB=1\nrun --a $A --b $B", {"a": "$A", "b": "1"}),
        ("for lr in 1 2; do run --lr $lr; done", {"lr": "$lr"}),
        ('C=(--a 1)\nif [ $1 ]; then C+=(--b 2); fi\nrun "${C[@]}" "$@"', {"a": "1", "$C": None, "$@": None}),
        ("run --bf16 --lr 1 $EXTRA", {"bf16": None, "lr": "1", "$EXTRA": None}),
        ("cat > x <<END\ntorchrun other.py --lr 5\nEND\nrun --lr 1", {"lr": "1"}),
        ("run \\\n  --a 1 \\\n  # --off 2 \\\n  --b 3", {"a": "1", "b": "3"}),
        ("python prepare.py --input x\nrun --a 1", {"a": "1"}),
        ("A=1 nohup run --a 1 > log 2>&1 &", {"a": "1"}),
        ("bash -c 'run --a 1'", {"a": "1"}),
        ("N=4\nrun --a $(expr 16 / $N) --b `expr $N \\* 2`", {"a": "4", "b": "8"}),
        (
            "N=$(wc -l <hosts)\nA='\n  --one 1 \n --n $((N * 2))'\nA=\"--m $N $A\"\nrun $A",
            {"m": "$(wc -l <hosts)", "one": "1", "n": "$((N * 2))"},
        ),
        ("GIVEN=$(date)\nrun --a $GIVEN", {"a": "mine"}),
        ("source settings.sh\nrun --a $HIDDEN", {"a": "1"}),
    ],
)
def test_the_shell_is_resolved_as_bash_does(script: str, expected: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "settings.sh").write_text("HIDDEN=1\n")
    read = read_script(script.replace("run ", "torchrun m.py ") + "\n", {"GIVEN": "mine"}, tmp_path)
    assert dict(read.flags()) == expected
    assert [name for name, value in expected.items() if is_open(f"{name}{value}")] == [
        name for name, value in expected.items() if "$" in f"{name}{value}"
    ]


def test_a_file_that_a_script_takes_settings_from_and_that_is_not_here_is_named(project: Path) -> None:
    write({"a.sh": "source env.sh\n. /opt/set_env.sh\ntorchrun x.py --lr ${LR:-1} --bf16 $MORE\n"})
    text = migrate(["a.sh"])
    lost, needless = text.split("# No counterpart")[1].split("# Not needed")
    assert "source env.sh: it does not lie here" in lost
    assert "--bf16 $MORE" in lost
    assert "source /opt/set_env.sh" in needless


def test_what_stands_behind_a_configuration_file_goes_before_it(project: Path) -> None:
    sft = {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "full", "learning_rate": 1e-4}
    write({"sft.yaml": sft, "run.sh": "FORCE_TORCHRUN=1 llamafactory-cli train sft.yaml learning_rate=2e-5\n"})
    assert yaml.safe_load(migrate(["run.sh"]))["train"]["learning_rate"] == 2e-5


def test_llama_factory_is_known_by_its_command_line_too(project: Path) -> None:
    info = {"mine": {"file_name": "rows.json"}, "theirs": {"file_name": "b.json", "columns": {"prompt": "question"}}}
    flags = "--model_name_or_path m --stage sft --finetuning_type lora --dataset mine,theirs --warmup_steps 0.1"
    flags += " --max_steps 50 --deepspeed ds_z3_offload_config.json --use_badam false"
    write({"data/dataset_info.json": info, "run.sh": f"deepspeed --num_gpus 4 src/train.py {flags}\n"})
    text = migrate(["run.sh"])
    tree = yaml.safe_load(text)
    assert tree["data"]["train"] == ["data/rows.json", {"path": "data/b.json", "attr": {"prompt": "question"}}]
    assert tree["train"]["warmup_steps"] == 5
    assert "memory.offload_optimizer" in text.split("# No counterpart")[1].split("# Not needed")[0]
    assert "use_badam: off" in text


@pytest.mark.parametrize("flag", ["gradient_accumulation_steps", "freeze_vit", "dataset", "warmup_ratio", "adam_beta1"])
def test_a_value_that_is_not_known_or_no_number_is_a_fault_of_its_setting(flag: str, project: Path) -> None:
    value = "rows.json#$N" if flag == "dataset" else "$(nproc)"
    write({"run.sh": f"swift sft --model m --max_steps 9 --{flag} '{value}'\n"})
    with pytest.raises(MigrateError, match=rf"run.sh: --{flag}: expected .*\$") as raised:
        migrate(["run.sh"])
    assert "give NAME=VALUE" in str(raised.value)


def test_parts_that_have_no_name_here_are_listed(project: Path) -> None:
    data = {"dataset_param": {"attr": {"images": "pics", "packing": False, "depth": "d"}}}
    newer = {**NEWER, "features": {"recompute": True, "recompute_plan": {"apply_modules": ["model.visual", "t5"]}}}
    text = migrate(write({"data.json": data}))
    assert yaml.safe_load(text)["data"] == {"attr": {"images": "pics"}}
    assert "attr.depth d: data.attr.* has no such key" in text
    assert "recompute_plan.apply_modules t5: no component here" in migrate(write({"config.yaml": newer}))


def test_swift_on_megatron_is_read_by_the_flags_of_both(project: Path) -> None:
    command = (
        "megatron sft --model m --dataset data/rows.json 'b.jsonl#5' --tuner_type lora --micro_batch_size 1 --lr 1e-4"
    )
    write({"run.sh": f"NPROC_PER_NODE=8 {command} --expert_model_parallel_size 2 --max_epochs 1 --max_length 512\n"})
    tree = yaml.safe_load(migrate(["run.sh"]))
    assert tree["train"]["packs_per_step"] == 16  # its default
    assert tree["train"]["learning_rate"] == 1e-4
    assert tree["train"]["epochs"] == 1
    assert tree["parallel"] == {"expert": 2}
    assert tree["policy"]["text"]["lora"]["alpha"] == 32
    assert tree["data"]["train"] == ["data/rows.json", {"path": "b.jsonl", "max_samples": 5}]


@pytest.mark.parametrize("system", ["megatron", "transformers"])
def test_every_rule_names_a_key_that_there_is_and_how_it_is_read(system: str) -> None:
    keys = {name for name, *_ in keys_of()}
    for name, rule in read_rules(system).items():
        known = any(fnmatch(rule.key, key) or fnmatch(key, rule.key) for key in keys)  # either may hold a `*`
        assert rule.why or "*" in rule.values or (known and rule.reads in READERS), name
