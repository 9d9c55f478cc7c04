"""The verbs of the command line. Each parses, calls one function and prints; nothing is decided here."""

from __future__ import annotations

import importlib.metadata
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from omniloom.exit_codes import BAD_INPUT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ConfigWords = Annotated[
    list[str] | None, typer.Argument(help="a YAML file, then dotted overrides", metavar="[CONFIG] [A.B=C]...")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted overrides, e.g. data.video.fps=4", metavar="[A.B=C]...")
]
AdapterDir = Annotated[str | None, typer.Option("--adapter", help="a PEFT adapter, to be put on the model")]
Nproc = Annotated[int | None, typer.Option("--nproc", help="ranks to start here; under torchrun leave it out")]
ModelName = Annotated[str, typer.Argument(help="a directory or hub id of a model, or a run: its newest model")]
ImageFiles = Annotated[list[str] | None, typer.Option("--image", help="an image of the question; may be repeated")]
AudioFiles = Annotated[list[str] | None, typer.Option("--audio", help="a sound of the question; may be repeated")]
VideoFiles = Annotated[list[str] | None, typer.Option("--video", help="a video of the question; may be repeated")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="tokens of an answer at most")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, more draws")]
TopP = Annotated[float, typer.Option(help="draw from this share of the likeliest tokens")]
TopK = Annotated[int, typer.Option(help="draw from so many of the likeliest tokens; 0 is all")]
Seed = Annotated[int, typer.Option(help="of drawn tokens")]
SpeakerName = Annotated[str, typer.Option(help="whose voice; without it the row's, or the usual one")]
SpeechTemperature = Annotated[float, typer.Option(help="of the codes of speech; 0 takes the likeliest")]
SpeechSeconds = Annotated[float, typer.Option(help="of a spoken answer at most")]


@app.command()
def train(
    words: ConfigWords = None,
    nproc: Nproc = None,
    nnodes: Annotated[int | None, typer.Option(help="machines; the same command starts on each of them")] = None,
    node_rank: Annotated[int | None, typer.Option(help="this machine's number, from 0")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="a free port of machine 0, where all ranks meet")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start anew: remove what an earlier run left in train.run_dir")
    ] = False,
) -> None:
    """Train a model: omniloom train CONFIG a.b=c ..., or just model.path=DIR data.train=FILE."""
    from omniloom.config import config_from_words
    from omniloom.parallel.degrees import resolve_degrees
    from omniloom.tools.launch import Launch, launch_or_join

    config = config_from_words(words or [])  # a wrong word ends here, before torch is imported and ranks are started

    def run_here() -> int:
        if os.environ.get("RANK", "0") == "0":  # the first seconds go by with imports
            print(f"starting the run in {config.train.run_dir}", flush=True)
        from omniloom.tools.report import train_with_report

        done = "wrote {}/report.html".format
        return train_with_report(config, on_end=lambda run_dir: print(done(run_dir)), overwrite=overwrite)

    def check_world(num_ranks: int) -> None:
        if config.parallel.layout == "given":
            resolve_degrees(config.parallel, num_ranks, packs_per_step=config.train.packs_per_step)

    flags = ["--overwrite"] if overwrite else []
    launch = Launch(nproc=nproc, nnodes=nnodes, node_rank=node_rank, rdzv_endpoint=rdzv_endpoint)
    with _interrupts_end_at_once():
        raise typer.Exit(launch_or_join(run_here, ["train", *flags, *(words or [])], launch, check_world))


@app.command()
def demo(directory: Annotated[Path, typer.Argument(help="where to put everything")] = Path("runs/demo")) -> None:
    """Build a tiny model and a small media data set, train, evaluate, export, draw a report."""
    from omniloom.tools.demo import run_demo

    run_demo(directory)


@app.command()
def tiny(
    family: Annotated[str, typer.Argument(help="qwen3_omni, qwen2_5_omni, qwen3_vl, ...; an unknown one lists all")],
    directory: Annotated[Path, typer.Argument(help="where to write it")],
    size: Annotated[str, typer.Option(help="tiny or 20m")] = "tiny",
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    """Write a tiny random checkpoint in the published layout."""
    from omniloom.tools.tiny import make_tiny

    make_tiny(family, directory, size=size, seed=seed)
    print(f"wrote {family} ({size}) to {directory}")


@app.command()
def score(
    model: ModelName,
    words: Annotated[
        list[str],
        typer.Argument(help="files, folders, 'patterns' of rows; dotted overrides", metavar="DATA... [A.B=C]..."),
    ],
    adapter: AdapterDir = None,
    worst: Annotated[
        int | None, typer.Option(min=1, help="only so many rows of the highest loss, with their words and media")
    ] = None,
) -> None:
    """Print the loss of every sample as JSON lines: {"id", "num_loss_tokens", "loss"}; of speech too."""
    from omniloom.config import is_override
    from omniloom.tools.score import score_file

    data, overrides = ([word for word in words if is_override(word) == which] for which in (False, True))
    score_file(model, data, overrides, adapter=adapter, worst=worst)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run, or one of its checkpoints/step_...")],
    directory: Annotated[Path, typer.Argument(help="where to write it")],
    adapter: Annotated[bool, typer.Option("--adapter", help="LoRA adapters alone, as PEFT loads them")] = False,
    best: Annotated[bool, typer.Option("--best", help="the run's best checkpoint, by its checkpoint.best")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export in DIRECTORY")] = False,
) -> None:
    """Write a Hugging Face directory from a run or one of its checkpoints."""
    from omniloom.tools.export import export_checkpoint

    export_checkpoint(source, directory, adapter=adapter, best=best, overwrite=overwrite)
    print(f"wrote {directory}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories", metavar="RUN...")],
    page: Annotated[Path, typer.Option(help="of several runs: the file to write")] = Path("comparison.html"),
) -> None:
    """Draw report.html for a run, finished or going; of several runs a page that compares them."""
    from omniloom.tools.comparison import write_comparison
    from omniloom.tools.report import write_report

    print(f"wrote {write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, page)}")


@app.command()
def generate(
    model: ModelName,
    words: Annotated[
        list[str] | None, typer.Argument(help="the question, then dotted overrides", metavar="[PROMPT] [A.B=C]...")
    ] = None,
    image: ImageFiles = None,
    audio: AudioFiles = None,
    video: VideoFiles = None,
    data: Annotated[str | None, typer.Option(help="rows to answer, instead of one prompt")] = None,
    adapter: AdapterDir = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    speech: Annotated[
        Path | None, typer.Option(help="speak the answer into this wav file, those of --data into this folder")
    ] = None,
    speaker: SpeakerName = "",
    speech_temperature: SpeechTemperature = 0.9,
    speech_seconds: SpeechSeconds = 120.0,
    listen: Annotated[str | None, typer.Option(help="of --speech: a command that prints a wav file's words")] = None,
) -> None:
    """Answer a prompt about media, or every row of a file, with transformers' generate fed by our processor."""
    from omniloom.tools.generate import Sampling, answers, print_answers, split_words

    media = {"image": image or [], "audio": audio or [], "video": video or []}
    prompt, overrides = split_words(words or [], has_data=data is not None)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens)
    options: Any = {"data": data, "sampling": sampling, "overrides": overrides, "adapter": adapter}
    if speech is not None:
        from omniloom.tools.speak import Voice, spoken_answers

        how: Any = {"speaker": speaker, "temperature": speech_temperature, "seconds": speech_seconds, "listen": listen}
        lines = spoken_answers(model, prompt, media, Voice(target=speech, **how), **options)
        print_answers(lines, as_json=data is not None)
        return
    if speaker or listen is not None:
        raise ValueError("--speaker and --listen are of spoken answers; name a wav file with --speech, too")
    print_answers(answers(model, prompt, media, **options), as_json=data is not None)


@app.command()
def chat(
    model: ModelName,
    overrides: Overrides = None,
    image: ImageFiles = None,
    audio: AudioFiles = None,
    video: VideoFiles = None,
    adapter: AdapterDir = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    speech: Annotated[Path | None, typer.Option(help="speak the answers, too, into wav files of this folder")] = None,
    speaker: SpeakerName = "",
    speech_temperature: SpeechTemperature = 0.9,
    speech_seconds: SpeechSeconds = 120.0,
) -> None:
    """Talk with a model; /image PATH, /audio PATH, /video PATH go with the next line, /reset forgets, /quit leaves."""
    from omniloom.tools.chat import chat as talk
    from omniloom.tools.generate import Sampling
    from omniloom.tools.speak import Voice

    if speaker and speech is None:
        raise ValueError("--speaker is of spoken answers; name a folder for their wav files with --speech, too")
    how: Any = {"speaker": speaker, "temperature": speech_temperature, "seconds": speech_seconds}
    media = {"image": image or [], "audio": audio or [], "video": video or []}
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens)
    talk(
        model,
        media,
        sampling=sampling,
        overrides=overrides or [],
        adapter=adapter,
        voice=None if speech is None else Voice(target=speech, **how),
    )


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help="format of the source (llava, sharegpt, ...), webdataset, or speech")],
    source: Annotated[Path, typer.Argument(help="a file of rows")],
    target: Annotated[Path, typer.Argument(help="the file to write, or the folder of shards")],
    overrides: Overrides = None,
    codec: Annotated[Path | None, typer.Option(help="of speech: a directory of kyutai/mimi")] = None,
    groups: Annotated[int, typer.Option(help="of speech: codes of a frame")] = 16,
    workers: Annotated[int, typer.Option(help="of speech: processes that encode")] = 1,
) -> None:
    """Write rows in the messages form, any rows as tar shards (webdataset), or recordings as codes (speech)."""
    from omniloom.tools.convert import convert_file

    num_outside = 0
    if kind != "speech" and codec is not None:
        raise ValueError(f"--codec is for `convert speech`, not for `convert {kind}`; leave it out")
    if kind == "speech":
        from omniloom.tools.convert_speech import convert_speech

        if codec is None or overrides:
            raise ValueError("convert speech DATA OUT --codec MIMI_DIR: it takes a codec, and no overrides")
        num_written, problems = convert_speech(source, target, codec, num_groups=groups, workers=workers)
    else:
        num_written, problems, num_outside = convert_file(kind, source, target, overrides or [])
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"wrote {num_written} rows to {target}, left out {len(problems)}")
    if num_outside:
        print(f"{num_outside} media files lie elsewhere: train on it with data.allow_outside_media_dir=true")


@app.command()
def migrate(
    words: Annotated[
        list[str],
        typer.Argument(help="files, then variables that a script leaves open", metavar="FILE... [NAME=VALUE]..."),
    ],
) -> None:
    """Print the config that files of MindSpeed-MM, Pai-Megatron-Patch, LLaMA-Factory or ms-swift come to."""
    from omniloom.tools.migrate.write import migrate as migrate_files

    print(migrate_files(words), end="")


@app.command()
def check(
    words: ConfigWords = None,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="check the layout for so many ranks")] = None,
    write_excludes: Annotated[
        Path | None, typer.Option(help="a file for the rows that cannot be trained, which data.exclude takes")
    ] = None,
) -> None:
    """Check a config, its checkpoint and all its rows and media without training."""
    from omniloom.tools.check import check_config

    check_config(words or [], nproc=nproc, excludes=write_excludes)


@app.command()
def preview(
    words: ConfigWords = None,
    rows: Annotated[int, typer.Option(help="how many rows")] = 3,
    page: Annotated[Path | None, typer.Option(help="write an HTML page of them, and of the first packs")] = None,
) -> None:
    """Show how rows are rendered, tokenised and labelled."""
    if page is not None:
        from omniloom.tools.preview_page import write_page

        write_page(words or [], page, rows)
        return
    from omniloom.tools.preview import preview_rows

    preview_rows(words or [], rows)


@app.command()
def plan(
    words: ConfigWords = None,
    steps: Annotated[int, typer.Option(help="how many steps")] = 10,
    gpus: Annotated[int | None, typer.Option(min=1, help="rank the layouts on so many devices, instead")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of each device, with --gpus")] = None,
    nodes: Annotated[int | None, typer.Option(help="machines that they are in; else eight in each")] = None,
) -> None:
    """Show the first steps' packs; or with --gpus the layouts on machines that one does not have, by estimate."""
    if gpus is not None:
        from omniloom.tools.plan import show_layouts

        show_layouts(words or [], gpus, memory, nodes)
        return
    if memory is not None or nodes is not None:
        raise ValueError("--memory and --nodes rank layouts: say with them how many devices there are, as --gpus 8")
    from omniloom.tools.preview import show_plan

    show_plan(words or [], steps)


@app.command()
def config(
    name: Annotated[
        str | None, typer.Argument(help="a section or key; without it all", metavar="[SECTION|KEY]")
    ] = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="a YAML file with every key, default and word")] = False,
    page: Annotated[bool, typer.Option("--page", help="the text of docs/configuration.md")] = False,
) -> None:
    """Say what can be set: every key, its type, its default and what it does."""
    from omniloom.tools import configuration

    print(configuration.page() if page else configuration.defaults() if defaults else configuration.describe(name))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="print the version and leave", is_eager=True)] = False,
) -> None:
    """Fine-tune omni-modal language models from a published checkpoint and a data file."""
    if show:
        print(f"omniloom {importlib.metadata.version('omniloom')}")
        raise typer.Exit


def main() -> None:
    """Console entry. What a user can act on is one message, and exit code 2 for bad input or the one of its RunError;
    everything else is a fault of ours and keeps its traceback. --debug anywhere shows it always,
    and what libraries warn of.
    """
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    if not debug:
        _hush_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # words that a terminal without UTF-8 lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=arguments)  # usage errors and Ctrl-C end here, by the library's own messages and codes
    except (ValueError, OSError) as error:
        _end(error, BAD_INPUT, debug)
    except (RuntimeError, MemoryError) as error:
        from omniloom.run.short_memory import says_memory_is_short  # costs imports, which whoever raised it has done
        from omniloom.types import RunError

        if isinstance(error, RunError):
            _end(error, error.exit_code, debug)
        if not says_memory_is_short(error):
            raise
        error.add_note("memory is short: lower data.pack_tokens or data.image.max_pixels, or use a larger device")
        _end(error, RunError.exit_code, debug)


@contextmanager
def _interrupts_end_at_once() -> Iterator[None]:
    """Ctrl-C ends the process, until a run listens: Python's own handler is never called while native code waits for
    other machines, and breaks off imports of libraries that go on without what they lack.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _hush_libraries() -> None:
    """Keep warnings of torch and transformers off the screen, on which users of ours cannot act."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers)(\..*)?$")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _end(error: Exception, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
