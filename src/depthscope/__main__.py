"""`python -m depthscope`, which is also what `torchrun -m depthscope` runs."""

from depthscope.cli import main

if __name__ == "__main__":
    main()
