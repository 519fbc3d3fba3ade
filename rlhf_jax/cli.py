"""The command line: train, study, bench, sample, eval, export, convert, report, show, and more.

A user's mistake ends with one message and exit status 2; a run that cannot go on with 1; a run
that a signal stopped, its state saved, with 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax import cli_pods


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    _quiet()
    import jax

    from rlhf_jax import processes
    from rlhf_jax.checkpoint import CheckpointError, Stopped
    from rlhf_jax.config import ConfigError
    from rlhf_jax.data import DataError
    from rlhf_jax.report import ReportError
    from rlhf_jax.rewards import RewardError
    from rlhf_jax.study.results import ResultsError
    from rlhf_jax.train import RunError

    try:
        if options.joins is not None:
            options.setup = processes.start(getattr(options, options.joins, None))
        status = options.run(options)
    except (ConfigError, DataError, ReportError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.abandon(2)
        return 2
    except (RunError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.abandon(1)
        return 1
    except (CheckpointError, OSError) as error:  # perhaps for another's death: JAX says so
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not processes.broken_link(error):
            raise
        print(f"error: the link to another process broke: {error}"[:300], file=sys.stderr)
        return 1  # JAX waits for the others, and names who is gone
    except Stopped as stopped:
        print(f"{stopped}", flush=True)
        status = getattr(options, "stopped_status", 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    processes.finish()
    return 0 if status is None else status


def _quiet() -> None:
    """Settings of the process: a persistent compilation cache, and no chatter of C++ libraries."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises, from threads
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        from rlhf_jax.data import cache_directory

        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf-jax", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    # joins: the other processes, if there are any; the option that names a directory all can see
    def command(name, run, text, *, joins=None):
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(run=run, joins=joins)
        return found

    def experiment(found):
        found.add_argument("file", metavar="FILE", help="an experiment: a .py file with config()")
        settings(found)

    def settings(found):
        found.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="A.B=VALUE",
            help="override a number of the experiment; may be repeated",
        )

    def run_directory(found):
        found.add_argument("directory", metavar="RUN", help="the --out of a train command")
        found.add_argument("--stage", help="a stage of a pipeline; default: the last run")
        found.add_argument("--file", help="the experiment's file, if it has moved")

    train = command("train", _train, "run an experiment, or go on with one", joins="out")
    experiment(train)
    train.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument(
        "--stopped-status",
        type=int,
        default=0,
        metavar="N",
        help="exit status of a run that a signal stopped; default: 0",
    )

    study = command("study", _study, "run a study: arms × seeds, verdicts and one page")
    experiment(study)
    study.add_argument("--preset", default="cpu", help="settings of the file; default: cpu")
    study.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    study.add_argument("--arms", metavar="A,B", help="some of the arms; default: all of the preset")
    study.add_argument("--seeds", metavar="N", help="the first N seeds, or some: 0,3,5")

    bench = command("bench", _bench, "measure an experiment's iteration, phase by phase", joins="")
    experiment(bench)
    bench.add_argument("--repeats", type=int, default=5, help="iterations that count; default: 5")
    bench.add_argument("--out", metavar="FILE", help="a .json file for all that was measured")
    bench.add_argument("--profile", metavar="DIR", help="a trace of one more, for xprof")

    sample = command("sample", _sample, "let a trained policy write, or a model of Hugging Face")
    run_directory(sample)
    sample.add_argument(
        "--chat", action="store_true", help="of a directory of Hugging Face: prompts are questions"
    )
    sample.add_argument("--prompt", action="append", help="how the text begins; may be repeated")
    sample.add_argument("--learner", default="policy")
    sample.add_argument("--count", type=int, default=4, help="samples of each prompt")
    sample.add_argument("--length", type=int, default=40, help="tokens at most")
    sample.add_argument("--temperature", type=float, help="default: the run's own")
    sample.add_argument("--top-k", type=int, help="0: all; default: the run's own")
    sample.add_argument("--top-p", type=float, help="1: all; default: the run's own")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--step", type=int, help="a checkpoint's step; default: the latest")

    evaluate = command(
        "eval", _eval, "evaluate a run's last checkpoint on its held-out data", joins="directory"
    )
    run_directory(evaluate)

    export = command(
        "export", _export, "write a trained model as a directory of Hugging Face", joins="directory"
    )
    run_directory(export)
    export.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    export.add_argument("--learner", default="policy")
    export.add_argument("--step", type=int, help="a checkpoint's step; default: the latest")
    export.add_argument("--dtype", help="float32, bfloat16 or float16; default: the origin's")
    export.add_argument("--adapter", action="store_true", help="the adapter alone, for PEFT")
    export.add_argument(
        "--origin",
        metavar="DIR",
        help="directory of Hugging Face that gives tokenizer and config; default: the run's own",
    )

    convert = command("convert", _convert, "write a GGUF file as a directory of Hugging Face")
    convert.add_argument("gguf", metavar="FILE", help="a Llama of llama.cpp")
    convert.add_argument("--out", required=True, metavar="DIR", help="the directory to write")

    report = command("report", _report, "write one HTML page about a run")
    report.add_argument("directory", metavar="RUN", help="the --out of a train or study command")
    report.add_argument("--file", help="the study's file, if it has moved")

    cli_pods.add(command, settings)

    show = command("show", _show, "print an experiment with all its numbers, and its batch plan")
    experiment(show)
    show.add_argument("--preset", help="of a study: show it with these settings")
    return parser


def _train(options) -> None:
    import jax

    from rlhf_jax import runs

    out = runs.start(options.file, options.settings, options.out, resume=options.resume)
    if jax.process_index() == 0:
        print(f"report: {_reported(out)}", flush=True)


def _reported(directory):
    """Write a run's report beside what it is about."""
    from rlhf_jax.bucket import Mirror
    from rlhf_jax.report import report

    with Mirror(directory) as mirror:
        return directory / report(mirror.here).name


def _study(options) -> None:
    from rlhf_jax.study import command

    arms = None if options.arms is None else [name.strip() for name in options.arms.split(",")]
    command.run(
        options.file,
        options.settings,
        options.out,
        preset=options.preset,
        arms=arms,
        seeds=options.seeds,
    )


def _bench(options) -> None:
    from rlhf_jax import bench
    from rlhf_jax.experiment import load

    found = bench.bench(
        load(options.file, options.settings), repeats=options.repeats, profile=options.profile
    )
    bench.show(found)
    if options.out is not None:
        Path(options.out).write_text(json.dumps(found, indent=1))


def _report(options) -> None:
    from rlhf_jax.bucket import place
    from rlhf_jax.study import command

    directory = place(options.directory)
    if (directory / "study.json").is_file():
        print(command.report(directory, file=options.file))
    else:
        print(_reported(directory))


def _show(options) -> None:
    import jax

    from rlhf_jax.check import check
    from rlhf_jax.config import Config, batch_plan, runs_of
    from rlhf_jax.experiment import describe, load, load_study

    if options.preset is not None:
        study, settings = load_study(options.file, options.preset, options.settings)
        print(json.dumps({"settings": describe(settings), "study": describe(study)}, indent=2))
        return
    value = load(options.file, options.settings)
    plans = {}
    for name, run in runs_of(value).items():
        check(run, devices=jax.device_count())
        plans[name] = batch_plan(run, devices=jax.device_count())
    single = isinstance(value, Config)
    shown = {"config": describe(value), "batch plan": plans[value.name] if single else plans}
    print(json.dumps(shown, indent=2))


def _sample(options) -> None:
    from rlhf_jax import runs
    from rlhf_jax.config import ConfigError
    from rlhf_jax.inference import sample_model, sample_texts
    from rlhf_jax.models import pretrained

    if pretrained.is_directory(options.directory):
        if options.chat and not options.prompt:
            raise ConfigError("--chat needs a question: --prompt '...'")
        names = ("chat", "count", "length", "temperature", "top_k", "top_p", "seed")
        given = {name: getattr(options, name) for name in names}
        for text in sample_model(options.directory, prompts=options.prompt or [""], **given):
            print(f"- {text}")
        return
    if options.chat:
        raise ConfigError(
            f"--chat asks a directory of Hugging Face, which {options.directory} is not; "
            "rlhf-jax export makes one of a run"
        )
    config, directory = runs.stage_of(
        runs.find(options.directory, file=options.file), options.stage
    )
    texts = sample_texts(
        config,
        directory,
        prompts=options.prompt if options.prompt is not None else [""],
        learner=options.learner,
        count=options.count,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        step=options.step,
    )
    for text in texts:
        print(f"- {text}")


def _export(options) -> None:
    from rlhf_jax import runs
    from rlhf_jax.inference import export

    config, directory = runs.stage_of(
        runs.find(options.directory, file=options.file), options.stage
    )
    print(
        export(
            config,
            directory,
            options.out,
            learner=options.learner,
            step=options.step,
            dtype=options.dtype,
            adapter=options.adapter,
            origin=options.origin,
        )
    )


def _convert(options) -> None:
    from rlhf_jax.config import ConfigError
    from rlhf_jax.models.gguf import convert

    try:
        print(convert(options.gguf, options.out))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _eval(options) -> None:
    from rlhf_jax import runs
    from rlhf_jax.inference import evaluate_checkpoint

    config, directory = runs.stage_of(
        runs.find(options.directory, file=options.file), options.stage
    )
    found = evaluate_checkpoint(config, directory)
    (directory / "eval.json").write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        print(f"{name:40s} {value:.5g}")


if __name__ == "__main__":
    sys.exit(main())
