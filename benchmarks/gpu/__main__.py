"""`python -m benchmarks.gpu`: the benchmark, or one sentence and exit code 2 where it cannot be imported."""

import sys


def main() -> int:
    try:
        from .bench import main as bench
    except (ImportError, RuntimeError) as error:  # without the extension its ops are not there
        why = str(error).splitlines()[0].split(" (")[0]  # without the paths that may follow
        print(f"bench-gpu: {why}; `make bench-gpu` builds and installs what is needed.", file=sys.stderr)
        return 2
    return bench()


if __name__ == "__main__":
    sys.exit(main())
