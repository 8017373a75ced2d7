"""`python -m training.simulate`: the command `astroclip simulate` where only the simulator's packages are installed."""

import typer

from training.simulate.cli import register

app = typer.Typer(add_completion=False)
register(app)

if __name__ == "__main__":  # worker processes import this module again
    app()
