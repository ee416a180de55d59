"""`python -m fastdistill`, and `torchrun -m fastdistill` on several GPUs."""

from .cli import main

if __name__ == "__main__":
    main()
