"""The command line: sdopt run | report | env. Bad input is one line on stderr and exit code 2."""

import argparse
import sys
from contextlib import ExitStack
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
    run.add_argument("--weights", help="hub, random, or a local diffusers folder (default: the model's own)")
    run.add_argument("--steps", type=int, help="denoising steps (default: the model's; dpm_20 takes 20 at most)")
    run.add_argument(
        "--out", default="out", help="folder for the result file, the figure and the images (default: out)"
    )
    run.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    run.add_argument("--height", type=int, help="in pixels, a multiple of 8 (default: the model's)")
    run.add_argument("--width", type=int, help="in pixels, a multiple of 8 (default: the model's)")
    run.add_argument("--batch", type=int, default=1, help="pictures a call (default: 1)")
    run.add_argument("--runs", type=int, default=5, help="timed calls a row, after one to warm up (default: 5)")
    run.add_argument("--cutoff", type=float, default=0.4, help="share of the steps cfg_cutoff guides (default: 0.4)")
    run.add_argument("--only", metavar="ID,ID", help="measure these rows alone (each has all steps up to it)")
    run.set_defaults(call=_run)

    report = commands.add_parser("report", help="make the figures and the README's tables again from figures/data")
    report.add_argument("--check", action="store_true", help="change nothing; exit with 1 when any is stale")
    report.add_argument("--add", metavar="OUT", help="first copy the run in this folder into figures/data")
    report.set_defaults(call=_report)

    env = commands.add_parser("env", help="print the versions and the hardware, and the model `sdopt run` would pick")
    env.set_defaults(call=_env)
    return top


def main(argv=None):
    """Run one command; returns its exit code: 0, 1 when a row failed or a file is stale, 2 for bad input."""

    def command():
        options = parser().parse_args(argv)
        return options.call(options)

    try:
        return exit_code(command)
    except KeyboardInterrupt:
        print("sdopt: stopped; rows that were done are in the result file", file=sys.stderr)
        return 130


def _run(options):
    # Imported here, so that `sdopt --help` and a mistyped option answer at once.
    import torch
    from tqdm import tqdm

    from sdopt import models, pathfigures, report
    from sdopt.bench import walk

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    models.check_device(device)
    name = options.model
    if name is None:
        choice = models.pick(options.device)
        name = choice.name
        print(f"model: {name} ({choice.reason}); choose another with --model")
    shared = walk.settings(
        name, options.weights, options.height, options.width, options.steps, options.batch, options.runs
    )
    ids = walk.rows_to_measure(options.out, device, options.only.split(",") if options.only else None, options.cutoff)
    if shared["weights"] == "hub":  # here, where its progress bars are seen, and not in the process of the first row
        models.download(name)
    with ExitStack() as stack:
        bars = []

        def progress(done, text):
            if not bars:  # not before the first news, so that bad weights are answered by one line and no bar
                look = "{desc:36} {bar} {n}/{total} [{elapsed}]"
                bars.append(stack.enter_context(tqdm(total=len(ids), unit="row", bar_format=look)))
            bars[0].n = done
            bars[0].set_description_str(text)

        result = walk.walk(shared, ids, device, options.out, options.cutoff, progress)
        progress(len(ids), "done")
    print(report.text(result))
    written = Path(options.out) / f"{result['study']}.json"
    pathfigures.path_figure(written, written.with_suffix(""), written.with_suffix(".png"))
    print(f"\nwritten: {written}, {written.with_suffix('.png').name} and one image a step in {written.with_suffix('')}")
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

    from sdopt import models, results

    environment = results.environment("cuda" if torch.cuda.is_available() else "cpu")
    choice = models.pick()
    for key, value in {**environment, "machine": results.machine_name(environment)}.items():
        print(f"{key:13} {value or '-'}")
    print(f"{'model':13} {choice.name} ({choice.reason})")
    return 0
