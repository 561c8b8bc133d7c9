"""What the command lines of all scripts share: one line for a mistake, and numbers that must not be negative."""

import argparse


class Parser(argparse.ArgumentParser):
    """Keeps a docstring's line breaks; a mistake ends with one line and status 2, without the usage before it."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def natural(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)
