"""The `astroclip` command: finds the sub-commands of every package and turns errors into messages.

Packages own their commands. Each names a function ``register(app: typer.Typer) -> None`` under the entry
point group ``astroclip.commands`` (pyproject.toml); the library itself imports nothing above it. Modules
that register commands import torch and faiss inside the commands, so that ``astroclip --help`` is quick.

Exit codes: 0 done; 1 the command failed, or a package it needs is not installed; 2 wrong usage or an input
that cannot be used (`AstroClipError`); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from astroclip import __version__
from astroclip.errors import AstroClipError

__all__ = ["COMMAND_GROUP", "EXTRA_OF_MODULE", "build_app", "main"]

COMMAND_GROUP = "astroclip.commands"

# Importable module -> the extra of pyproject.toml that installs it.
EXTRA_OF_MODULE = {
    "bagpipes": "simulate",
    "faiss": "cpu",
    "galsim": "simulate",
    "jsonschema": "train",
    "kcorrect": "dev",
    "lightning": "train",
    "mlperf_logging": "train",
    "sklearn": "train",
    "speclite": "simulate",
    "umap": "map",
}

# Packages that a checkout has and the wheel has not.
CHECKOUT_ONLY = ("benchmarks", "index", "service", "training")


def build_app() -> typer.Typer:
    """Return the whole command line as one typer app, every group that can be imported registered."""
    app = typer.Typer(
        name="astroclip",
        help="Galaxy images and optical spectra in one embedding space: embed, search, estimate.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # `main` explains what a user can mend; the rest is a bug
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def _root(
        version: Annotated[
            bool,
            typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
        ] = False,
    ) -> None:
        pass

    for point in sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.name):
        _register(point, app)
    return app


def main() -> None:
    """Run the command line; console script ``astroclip``."""
    # Before NumPy is imported: after every product of matrices the threads of its BLAS turn on the spot for a tenth of
    # a second, in case there is another (2^28 cycles), which a service that searches now and then pays with a core.
    # 2^4 is the least that OpenBLAS takes; they sleep then, and wake in microseconds.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    # Before Arrow is imported: its own allocator (mimalloc) asks for huge pages, and what lies scattered there the
    # kernel fills up to such pages minutes later, 2 MB and more with nothing in them. The system's takes half a
    # microsecond longer for the rows of a search, and the process is 20 MB smaller.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        build_app()(prog_name="astroclip")
    except AstroClipError as error:
        where = f" [{error.field}]" if error.field else ""
        print(f"astroclip: {error.code}{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"astroclip: {_explain_missing(error.name or '')}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"astroclip {__version__}")
        raise typer.Exit()


def _register(point: EntryPoint, app: typer.Typer) -> None:
    """Add one group's commands; a group that cannot be imported costs its own commands and no others."""
    try:
        point.load()(app)
    except ModuleNotFoundError as error:
        name = error.name or ""
        # No remark where the group itself is absent, as in a wheel.
        if not f"{point.module}.".startswith(f"{name}."):
            print(f"astroclip: no '{point.name}' commands: {_explain_missing(name)}", file=sys.stderr)


def _explain_missing(name: str) -> str:
    """Say which package is missing and what installs it."""
    module = name.partition(".")[0]
    if module in EXTRA_OF_MODULE:
        mend = f"pip install 'astroclip[{EXTRA_OF_MODULE[module]}]'"
    elif module in CHECKOUT_ONLY:
        mend = "it is part of a checkout, not of the wheel: pip install -e . in a clone"
    else:
        mend = "pip install -e . in a clone, or pip install --upgrade astroclip"
    return f"the package '{module}' is not installed; {mend}"
