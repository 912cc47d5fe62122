"""python -m sdopt.notebooks execute|badges: run the course's notebooks in place, or stamp the repository's address."""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

from sdopt.errors import UserError, exit_code, first_line
from sdopt.report import ROOT
from sdopt.results import write_whole
from sdopt.widgets import VIEW

ADDRESS = re.compile(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"$', re.MULTILINE)


def execute(paths, timeout: int = 600) -> None:
    """Run notebooks from the top, each in a fresh kernel, and write them back with clean outputs.

    A notebook is written only after its last cell has run. Raises UserError for a file that is none, and for one that
    stops at a cell.
    """
    for path in (bar := tqdm(list(map(Path, paths)), unit="notebook")):
        bar.set_description(path.stem)
        try:
            notebook = nbformat.read(path, as_version=4)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({first_line(error)}): give the path of a notebook") from error
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": path.parent}}
        )
        try:
            client.execute()
        except CellExecutionError as error:
            raise UserError(f"{path.name} stopped: {error.ename}: {error.evalue}") from error
        except (DeadKernelError, CellTimeoutError) as error:
            raise UserError(f"{path.name} stopped: {first_line(error)}") from error
        write_whole(path, (nbformat.writes(clean(notebook)) + "\n").encode())


def clean(notebook):
    """Leave in a notebook what is the same at every run and what readers see; returns it.

    Gone: widget states, execution times and counts of the machine, and the kernel's version. Joined: printed pieces.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "data" in output:
                output["data"].pop(VIEW, None)
            if output.output_type == "execute_result":
                output["execution_count"] = number
    return notebook


def _joined(outputs):
    """Printed pieces that follow each other in one: where they were cut depends on the moment."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def address(root=ROOT) -> str:
    """The repository's owner/name, which stands in pyproject.toml."""
    return ADDRESS.search((root / "pyproject.toml").read_text())[1]


def stamp(repository: str, root=ROOT) -> list[Path]:
    """Write a new address, owner/name, to pyproject.toml, README.md, and every badge and set-up cell; returns the files changed."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"'{repository}' is no repository: give owner/name")
    old, changed = address(root), []
    for path in (root / "pyproject.toml", root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))):
        text = path.read_text()
        new = text.replace(f"github.com/{old}", f"github.com/{repository}").replace(
            f"/github/{old}/", f"/github/{repository}/"
        )
        if new != text:
            write_whole(path, new.encode())
            changed.append(path)
    return changed


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdopt.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("execute", help="run notebooks in place and clean their outputs")
    run.add_argument("paths", nargs="*", type=Path, help="default: all of the course")
    badges = commands.add_parser("badges", help="stamp the repository's address into badges and set-up cells")
    badges.add_argument("repository", metavar="OWNER/NAME")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options):
    if options.command == "execute":
        execute(options.paths or sorted((ROOT / "notebooks").glob("*.ipynb")))
    else:
        for path in stamp(options.repository):
            print(f"stamped: {path}")


if __name__ == "__main__":
    sys.exit(main())
