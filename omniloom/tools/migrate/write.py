"""Configurations of other trainers become one of ours: `omniloom migrate FILE ... > config.yaml`.

Recognises each file by what is in it, reads the files that they name where these exist, and writes YAML in which every
line says where it came from, followed by what was left out and why. Refuses rather than guesses.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from omniloom.config import load_config
from omniloom.options import as_yaml
from omniloom.tools.migrate.draft import Draft, Setting, flatten
from omniloom.tools.migrate.megatron import migrate_megatron
from omniloom.tools.migrate.shell import Script, is_open, read_script
from omniloom.tools.migrate.trainers import migrate_llama_factory, migrate_swift

KINDS = (
    "data.json, model.json, fsdp2_config.yaml, a training script, MindSpeed-MM's, LLaMA-Factory's or ms-swift's file"
)
ROW_FILES = {"file_name", "hf_hub_url", "ms_hub_url", "script_url"}  # where dataset_info.json says that rows lie
REFERENCES = ("mm_data", "mm_model", "fsdp2_config_path")
MEGATRON = "MindSpeed-MM or Megatron"
MEGATRON_KEYS = {
    *("dataset_param", "text_decoder", "image_encoder", "init_from_hf_path"),
    *("sharding_size", "reshard_after_forward", "num_to_forward_prefetch"),
}
UNKNOWN_WORDS = "only a running shell could tell which words it stands for; write them into the script"
PROGRAMS = {  # what the words of a command look like that start another trainer
    "LLaMA-Factory": r"(.*/)?llamafactory-cli|llamafactory\.\w+|.*llamafactory/\w+\.py|--finetuning_type.*",
    "ms-swift": r"(.*/)?swift|(.*/)?megatron|swift\.cli\.[\w.]+|.*swift/cli/(_megatron/)?\w+\.py",
}
SECTIONS = ("model", "data", "train", "policy", "parallel", "memory", "checkpoint", "log")
RATE_VARIABLES = {"max_pixels", "min_pixels", "video_max_pixels", "video_min_pixels", "fps", "fps_max_frames",
                  "use_audio_in_video", "enable_audio_output"}  # fmt: skip


class MigrateError(ValueError):
    """Files that cannot be brought over; the message lists every fault and what was understood."""


def migrate(words: Sequence[str]) -> str:
    """The YAML that files and `NAME=VALUE` (variables that a script leaves open) come to.

    Raises: MigrateError for files that are no such configuration, contradictions and values that nobody can know.
    """
    given = dict(word.split("=", 1) for word in words if _is_variable(word))
    paths = [Path(word) for word in words if not _is_variable(word)]
    if not paths:
        raise MigrateError(f"no file is named; expected one or more of {KINDS}")
    reading = Reading(given)
    for path in paths:
        reading.read(path)
    draft = reading.finish()
    if draft.faults:
        understood = "".join(f"\n  {line}" for line in _yaml_lines(draft))
        faults = "".join(f"\n  - {fault}" for fault in draft.faults)
        noun = "setting" if len(draft.faults) == 1 else "settings"
        raise MigrateError(
            f"{len(draft.faults)} {noun} cannot be brought over:{faults}\nwhat was understood:{understood}"
        )
    text = "\n".join([*_header(paths, given, draft), *_yaml_lines(draft), *_left_out(draft), ""])
    load_config(yaml.safe_load(text) or {})  # what is written here must be a config
    return text


def _system_of(script: Script) -> str | None:
    words = [word for command in script.commands for word in command]
    return next((name for name, looks in PROGRAMS.items() if any(re.fullmatch(looks, word) for word in words)), None)


def _swift_verb(script: Script) -> str:
    """What ms-swift is started to do: `swift sft`, `megatron sft`, `python swift/cli/sft.py` all say sft."""
    words = [word for command in script.commands for word in command]
    for word, following in itertools.pairwise([*words, ""]):
        if re.fullmatch(r"(.*/)?(swift|megatron)", word):
            return following
        if module := re.fullmatch(r".*swift[./]cli[./](?:_megatron[./])?(\w+?)(?:\.py)?", word):
            return following if module[1] == "main" else module[1]
    return ""


def _is_variable(word: str) -> bool:
    return re.match(r"\w+=", word) is not None and not Path(word).exists()


class Reading:
    """The files of one migration as they are read, each once."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = given
        self.draft = Draft()
        self.seen: set[Path] = set()
        self.kinds: set[str] = set()
        self.data_sets: dict[str, Any] | None = None
        self.folder = Path("data")

    def read(self, path: Path) -> None:
        if path.resolve() in self.seen:
            return
        self.seen.add(path.resolve())
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MigrateError(f"{path}: cannot be read: {error}") from None
        if path.suffix in (".json", ".yaml", ".yml"):
            self._read_tree(path, self._parse(path, text))
        else:
            self._read_script(path, text)

    def finish(self) -> Draft:
        """Let those deal with the settings whose they are."""
        draft = self.draft
        self._follow_references()
        if len(self.kinds) > 1:
            raise MigrateError(
                f"the files belong to several systems: {', '.join(sorted(self.kinds))}; give those of one"
            )
        if self.kinds == {"LLaMA-Factory"}:
            self._find_dataset_info()
            migrate_llama_factory(draft, self.data_sets, self.folder)
        elif self.kinds == {"ms-swift"}:
            migrate_swift(draft)
        else:
            migrate_megatron(draft)
            _use_published_path(draft)
        if len(draft.settings) > draft.num_known:
            names = ", ".join(one.origin for one in draft.settings[:3])
            draft.faults.append(
                f"{len(draft.settings)} settings ({names}, ...) are not known, more than are: expected {KINDS}"
            )
        draft.finish()
        return draft

    def _parse(self, path: Path, text: str) -> dict[str, Any]:
        try:
            tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            found = " ".join(" ".join(str(error).splitlines()[:3]).split())  # what, and at which line
            raise MigrateError(f"{path}: not valid {path.suffix[1:].upper()}: {found}") from None
        if not isinstance(tree, dict):
            got = "nothing" if tree is None else f"a {type(tree).__name__}"
            raise MigrateError(f"{path}: expected {KINDS}, got {got}")
        return tree

    def _read_tree(self, path: Path, tree: dict[str, Any]) -> None:
        keys = set(tree)
        by_sections = bool(keys & {"gpt_args", "training", "features"})  # one YAML file that holds everything
        if by_sections or keys & MEGATRON_KEYS:
            self.kinds.add(MEGATRON)
            for setting in flatten(tree, path.name):
                if by_sections and "." not in setting.name:  # values at the top are anchors that the rest refers to
                    self.draft.set_aside([replace(setting, value=None)], "an anchor")
                else:
                    self.draft.settings.append(replace(setting, name=_without_section(setting.name, by_sections)))
        elif keys & {"finetuning_type", "stage", "per_device_train_batch_size"} and "model_name_or_path" in keys:
            self.kinds.add("LLaMA-Factory")
            self.draft.settings += flatten(tree, path.name)
            self.folder = path.parent / "data"
        elif tree and all(isinstance(entry, dict) and ROW_FILES & set(entry) for entry in tree.values()):
            self.data_sets, self.folder = tree, path.parent
        else:
            raise MigrateError(
                f"{path}: expected {KINDS}; its keys ({', '.join(map(str, list(tree)[:6]))}) are of none"
            )

    def _read_script(self, path: Path, text: str) -> None:
        script = read_script(text, self.given, path.parent)
        if not script.commands:
            raise MigrateError(f"{path}: expected {KINDS}; it starts no training (torchrun, python, swift, ...)")
        self._count_ranks(script)
        for argument in script.arguments():
            key, overrides, text = argument.partition("=")
            if argument.endswith((".yaml", ".yml")):
                self._read_beside(path, argument, f"{path.name} starts with {argument}")
            elif overrides:
                self.draft.take(key)
                self.draft.settings.append(Setting(name=key, value=yaml.safe_load(text), origin=f"{path.name}: {key}="))
        flags = [(name.replace("-", "_"), value, f"{path.name}: --{name}") for name, value in script.flags()]
        swift = (system := _system_of(script)) == "ms-swift"
        if swift:
            flags += [(name.lower(), value, f"{path.name}: {name}") for name, value in script.exported.items()
                      if name.lower() in RATE_VARIABLES]  # fmt: skip
            if (verb := _swift_verb(script)) != "sft":
                self.draft.faults.append(f"{path.name}: swift {verb} is not offered; swift sft is")
        if system or not self.kinds:
            self.kinds.add(system or MEGATRON)
        for name, value, origin in dict.fromkeys(flags):
            if is_open(name):
                self.draft.lost.append((f"{path.name}: {name}", UNKNOWN_WORDS))
            elif name in REFERENCES and value:
                self._read_beside(path, value, origin)
            elif name not in (*REFERENCES, "mm_tool"):
                self.draft.settings.append(Setting(name=name, value=value, origin=origin))
        machine = [name for name in script.exported if name.lower() not in RATE_VARIABLES or not swift]
        for name in script.missing:
            if name[0] in "/~$":
                machine.append(f"source {name}")
            else:
                self.draft.lost.append(
                    (f"{path.name}: source {name}", "it does not lie here: what it sets is not known")
                )
        self.draft.set_aside(
            [Setting(name=name, value=None, origin=f"{path.name}: {name}") for name in machine],
            "environment of the machine; see docs/migrating",
        )

    def _count_ranks(self, script: Script) -> None:
        flags = dict(script.flags())
        per_node = flags.get("nproc_per_node") or flags.get("nproc-per-node") or script.exported.get("NPROC_PER_NODE")
        nodes = flags.get("nnodes") or script.exported.get("NNODES") or "1"
        if per_node and per_node.isdigit() and nodes.isdigit():
            self.draft.num_ranks = int(per_node) * int(nodes)

    def _read_beside(self, path: Path, name: str, origin: str) -> None:
        """A file that another names: as written, or by its own name beside it, or among those that were given."""
        if any(seen.name == Path(name).name for seen in self.seen):
            return
        for candidate in (Path(name), path.parent / name, path.parent / Path(name).name):
            if candidate.is_file():
                self.read(candidate)
                return
        if is_open(name):
            self.draft.faults.append(f"{origin}: {name} depends on what only a running shell could tell")
        else:
            self.draft.faults.append(f"{origin}: {name} does not exist from here; give that file too")

    def _follow_references(self) -> None:
        for setting in self.draft.take(*REFERENCES):
            if setting.value:
                self._read_beside(Path(), str(setting.value), setting.origin)

    def _find_dataset_info(self) -> None:
        where = next((one.value for one in self.draft.settings if one.name == "dataset_dir"), None)
        path = (Path(str(where)) if where else self.folder) / "dataset_info.json"
        if self.data_sets is None and path.is_file():
            self.data_sets = self._parse(path, path.read_text(encoding="utf-8"))


def _without_section(path: str, by_sections: bool) -> str:
    """A setting's name without the sections in which its file has it; those of the loader stay apart."""
    parts = path.split(".")[by_sections:]
    if parts[0] == "dataloader_param":
        parts[0] = "dataloader"
    return ".".join(parts[parts[0] == "dataset_param" :])


def _use_published_path(draft: Draft) -> None:
    """Pai-Megatron-Patch names the converted checkpoint only; its guide names it after the published one."""
    load = next((one for one, _ in draft.needless if one.name == "load"), None)
    if "model.path" in draft.entries or load is None or not load.value:
        return
    draft.needless = [(one, why) for one, why in draft.needless if one is not load]
    published = re.sub(r"-(to-)?mcore([-_].*)?$", "", str(load.value).rstrip("/"))
    draft.put("model.path", published, [load], "the published checkpoint that was converted; nothing is converted here")


# ---------------------------------------------------------------------------------------- writing


def _header(paths: Sequence[Path], given: Mapping[str, str], draft: Draft) -> list[str]:
    words = shlex.join([*map(str, paths), *(f"{name}={value}" for name, value in given.items())])
    lines = [f"# Made by: omniloom migrate {words}"]
    if draft.num_ranks is not None:
        lines.append(f"# It ran on {draft.num_ranks} devices: omniloom train config.yaml --nproc N on each node.")
    return lines


def _yaml_lines(draft: Draft) -> list[str]:
    tree: dict[str, Any] = {section: {} for section in SECTIONS}
    for key in draft.entries:
        parts = key.split(".")
        if parts[0] == "policy":  # component names have dots of their own
            tail = 2 if "lora" in parts else 1
            parts = ["policy", ".".join(parts[1:-tail]), *parts[-tail:]]
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = draft.entries[key]
    return [line for section in SECTIONS if tree[section] for line in _section(section, tree[section], "")]


def _section(name: str, node: Mapping[str, Any], indent: str) -> list[str]:
    lines = [f"{indent}{name}:"]
    for key, entry in node.items():
        if isinstance(entry, dict):
            lines += _section(key, entry, indent + "  ")
            continue
        note = f" ({entry.note})" if entry.note else ""
        lines.append(f"{indent}  {key}: {as_yaml(entry.value)}  # {'; '.join(entry.origins)}{note}")
    return lines


def _left_out(draft: Draft) -> list[str]:
    lines: list[str] = []
    if draft.lost:
        lines += ["", "# No counterpart:", *(f"#   {what}: {why}" for what, why in draft.lost)]
    if draft.needless:
        lines += ["", "# Not needed:"]
        reasons: dict[str, dict[str, list[str]]] = {}
        for setting, why in draft.needless:
            file, _, key = setting.origin.partition(": ")
            reasons.setdefault(why, {}).setdefault(file, []).append(key)
        for why, by_file in reasons.items():
            where = "; ".join(f"{file}: {', '.join(dict.fromkeys(keys))}" for file, keys in by_file.items())
            lines.append(f"#   {where}: {why}")
    return [line.replace("\n", " ") for line in lines]
