"""``python -m bitfront`` is the command ``bitfront``."""

from bitfront.cli import main

if __name__ == "__main__":
    main()
