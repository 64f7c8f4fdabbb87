"""Our server on mlx-lm's own kernels: without the forms that its layers get on a CPU.

    python -m bench.serve_plain [flags of python -m mlxlite]

A comparison on equal kernels needs it, and nothing else does: so the server has no flag for it, and
this program replaces the one function that gives layers those forms. On a GPU it changes nothing.
"""

from mlxlite.__main__ import main
from mlxlite.runner import cpu


def use_plain_kernels() -> None:
    """For this process, before a model is loaded."""
    assert callable(cpu.optimize_for_cpu)
    cpu.optimize_for_cpu = lambda network: None


if __name__ == "__main__":
    use_plain_kernels()
    main()
