import pytest

from neo_jax.cli import main


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """JAX has its devices by now, too late to join other processes: there are none."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; returns its status and what it printed."""

    def call(*args):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as exit_:  # --help
            status = exit_.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def succeed(run):
    """Runs a command line that must succeed; returns its stdout."""

    def call(*args):
        status, out, err = run(*args)
        assert status == 0, err
        return out

    return call


@pytest.fixture
def fail(run):
    """Runs a command line that must fail with a line on stderr alone; returns what it says."""

    def call(*args, status=1):
        found, out, err = run(*args)
        assert found == status, err
        assert out == ""
        assert err.startswith("neo-jax: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("neo-jax: ").removesuffix("\n")

    return call
