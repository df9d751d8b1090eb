"""`python -m editsweep`: the command without its console script."""

from orchestrator.cli.main import main

if __name__ == "__main__":
    main()
