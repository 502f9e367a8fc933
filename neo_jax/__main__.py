"""`neo-jax` and `python -m neo_jax`: the command line, with an eye on signals from here on."""

from neo_jax.devices.signals import WATCH


def main() -> None:
    """Runs the command line that this process was started by, and ends the process."""
    WATCH.start()
    from neo_jax import cli

    WATCH.end(cli.main())


if __name__ == "__main__":
    main()
