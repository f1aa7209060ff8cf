"""The `dfm-fast` command."""


def main() -> int:
    return 0
