"""The command line: sdopt run | bench | report | env. Bad input is one line on stderr and exit code 2."""

import argparse
import os
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sdopt.errors import UserError, exit_code


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}: see `{self.prog} --help`")


def parser():
    top = Parser(prog="sdopt", description="Stable Diffusion inference, one measured step at a time.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="walk the nine steps on this machine and print what each one buys")
    run.add_argument("--model", help="pocket, sd15 or sdxl (default: what suits this machine)")
    _common(run, rows="the figure", out="out")
    run.add_argument("--runs", type=int, default=5, help="timed calls a row, after one to warm up (default: 5)")
    run.add_argument("--cutoff", type=float, default=0.4, help="share of the steps cfg_cutoff guides (default: 0.4)")
    run.add_argument("--only", metavar="ID,ID", help="measure these rows alone (each has all steps up to it)")
    run.set_defaults(call=_run)

    bench = commands.add_parser("bench", help="measure one named study with care; stopped, it goes on where it was")
    bench.add_argument(
        "study",
        metavar="STUDY",
        help="{pocket,sd15,sdxl}-{path,engine,stages,break-even,batches}, {sd15,sdxl}-peers, sd15-hpml, "
        "{pocket,sdxl}-attribution, sdxl-throughput, pocket-quality or pocket-gate",
    )
    _common(bench, rows="the compiler's cache", out="bench")
    bench.add_argument("--runs", type=int, help="timed calls a row (default: the study's)")
    bench.add_argument("--pictures", type=int, metavar="N", help="quality: judged pictures a row (default: the study's)")
    bench.add_argument("--only", metavar="ID,ID", help="measure these rows alone")
    bench.add_argument("--retry", action="store_true", help="measure rows that failed again, too")
    bench.add_argument("--limit", type=float, default=3600, metavar="S", help="seconds a call may take (default: 3600)")
    bench.add_argument("--dry-run", action="store_true", help="list the rows and how long they may take, and stop")
    bench.set_defaults(call=_bench)

    report = commands.add_parser("report", help="make the figures and the README's tables again from figures/data")
    report.add_argument("--check", action="store_true", help="change nothing; exit with 1 when any is stale")
    report.add_argument("--add", metavar="OUT", help="first copy the run in this folder into figures/data")
    report.set_defaults(call=_report)

    env = commands.add_parser("env", help="print the versions and the hardware, and the model `sdopt run` would pick")
    env.set_defaults(call=_env)
    return top


def _common(command, rows, out):
    command.add_argument("--weights", help="hub, random, or a local diffusers folder (default: the model's own)")
    command.add_argument("--steps", type=int, help="denoising steps (default: the model's; dpm_20 takes 20 at most)")
    command.add_argument("--out", default=out, help=f"folder for the result file, {rows} and pictures (default: {out})")
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--height", type=int, help="in pixels, a multiple of 8 (default: the model's)")
    command.add_argument("--width", type=int, help="in pixels, a multiple of 8 (default: the model's)")
    command.add_argument("--batch", type=int, default=1, help="pictures a call (default: 1)")


def main(argv=None):
    """Run one command; returns its exit code: 0, 1 when a row failed or a file is stale, 2 for bad input."""

    def command():
        options, unknown = parser().parse_known_args(argv)
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}: see `sdopt {options.command} --help`")
        return options.call(options)

    try:
        return exit_code(command)
    except KeyboardInterrupt:
        print("sdopt: stopped; rows that were done, if any, are in the result file", file=sys.stderr)
        return 130


def _run(options):
    # Imported here, so that `sdopt --help` and a mistyped option answer at once.
    from sdopt import models, path, pathfigures, report
    from sdopt.bench import studies, walk

    device = _device(options)
    name = options.model
    if name is None:
        choice = models.pick(options.device)
        name = choice.name
        print(f"model: {name} ({choice.reason}); choose another with --model")
    shared = studies.settings(
        name, options.weights, options.height, options.width, options.steps, options.batch, options.runs
    )
    if not 0 <= options.cutoff <= 1:
        raise UserError(f"--cutoff {options.cutoff:g} is outside [0, 1]: it is the share of the steps that are guided")
    rows = studies.chosen(studies.nine(shared["steps"], options.cutoff), options.only)
    studies.check_room(options.out, shared)
    _download(shared)
    with _progress(len(rows), "row") as progress:
        result = walk.walk(shared, rows, device, options.out, progress, order=list(path.NUMBERS))
    print(report.text(result))
    written = Path(options.out) / f"{result['study']}.json"
    pathfigures.path_figure(written, written.with_suffix(""), written.with_suffix(".png"))
    print(f"\nwritten: {written}, {written.with_suffix('.png').name} and one image a step in {written.with_suffix('')}")
    return _exit_code(result)


def _bench(options):
    from sdopt import report, results
    from sdopt.bench import grids, peers, sharing, stages, studies, survey, throughput, walk
    from sdopt.bench.judge import Judge
    from sdopt.bench.ledger import Ledger, head

    study = studies.study(options.study)
    device = _device(options)
    given = [getattr(study, key) if (own := getattr(options, key)) is None else own for key in ("runs", "steps", "pictures")]
    runs, steps, pictures = given
    if study.pictures is None and pictures is not None:
        raise UserError(f"--pictures is for quality studies, {study.name} judges the pictures that it times: leave it out")
    if study.name.endswith(("-batches", "-throughput")) and options.batch != 1:
        raise UserError(f"--batch is not for {study.name}, whose rows are batches: choose some of them with --only")
    weights = options.weights or study.weights
    shared = studies.settings(
        study.model, weights, options.height, options.width, steps, options.batch, runs, pictures, study.guidance_scale
    )
    if not 0 < options.limit < float("inf"):
        raise UserError(f"--limit {options.limit:g} is no time a call may take: give seconds, or leave it out")
    every = studies.rows_of(study, device, shared["steps"])
    rows, order = studies.chosen(every, options.only), [row.id for row in every]
    if options.dry_run:
        ledger = Ledger(
            Path(options.out) / f"{study.name}.json",
            head(study.name, shared, device, Judge(shared).prompts, "bench"),
            order,
            resume=True,
            retry=options.retry,
        )
        machine = results.machine_name(ledger.result["environment"])
        path = report.recorded(machine, f"{study.model}-path")
        estimates = grids.reckon(rows, path, shared) if study.kind == "shared" else {}
        estimates |= studies.estimate(rows, report.recorded(machine, study.name), shared)
        print(report.plan(study, rows, estimates, machine, [row.id for row in rows if ledger.is_done(row.id)]))
        return 0
    studies.check_room(options.out, shared)
    _download(shared)
    measure, known = {
        "path": (partial(walk.walk, resume=True), order),
        "peers": (peers.take_turns, order),
        "quality": (survey.survey, every),
        "shared": (sharing.share, every),
        "stages": (stages.look, order),
        "throughput": (throughput.by_batch, order),
    }[study.kind]
    with _progress(*((runs, "round") if study.kind == "peers" else (len(rows), "row"))) as progress:
        more = {"retry": options.retry, "limit_s": options.limit} | ({} if study.kind == "path" else {"study": study.name})
        result = measure(shared, rows, device, options.out, progress, known, **more)
    print(report.text(result))
    print(f"\nwritten: {Path(options.out) / study.name}.json")
    if any(row["status"] == "ok" for row in result["rows"]):
        print(f"`sdopt report --add {options.out}` takes it into figures/data")
    return _exit_code(result)


def _device(options):
    import torch

    from sdopt import models

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    models.check_device(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own news, in the processes of the rows
    return device


def _download(shared):
    from sdopt import models

    if shared["weights"] == "hub":  # here, where its progress bars are seen, and not in the process of the first row
        models.download(shared["model"])


@contextmanager
def _progress(total, unit):
    """Within, a function `progress(done, text)` that shows a bar from its first call on."""
    from tqdm import tqdm

    bars, one_at_a_time = [], threading.Lock()  # rows that compile side by side have each a thread

    def progress(done, text):
        with one_at_a_time:
            if not bars:  # not before the first news, so that bad weights are answered by one line and no bar
                bars.append(tqdm(total=total, unit=unit, bar_format="{desc:44} {bar} {n}/{total} [{elapsed}]"))
            bars[0].n = done
            bars[0].set_description_str(text)

    try:
        yield progress
        progress(total, "done")
    finally:
        for bar in bars:
            bar.close()


def _exit_code(result):
    return 0 if all(row["status"] == "ok" for row in result["rows"]) else 1


def _report(options):
    from sdopt import report

    if options.add:
        print(f"added: {report.add(options.add)}")
    stale = report.stale() if options.check else report.renew()
    for path in stale:
        print(f"{'stale' if options.check else 'written'}: {path}")
    if options.check and stale:
        print(f"{len(stale)} file(s) do not match figures/data: run `sdopt report`", file=sys.stderr)
        return 1
    return 0


def _env(options):
    import torch

    from sdopt import attention, models, results
    from sdopt.bench import sensors

    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = results.environment(device)
    choice, unusable = models.pick(), attention.xformers_state()
    if environment["xformers"] and unusable:
        environment["xformers"] += f" ({unusable})"
    told = {**environment, "machine": results.machine_name(environment), "model": f"{choice.name} ({choice.reason})"}
    state = sensors.state() if device == "cuda" else None
    for key, value in {**told, **(state or {})}.items():
        print(f"{key:16} {value or '-'}")
    return 0
