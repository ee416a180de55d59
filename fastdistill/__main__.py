"""`python -m fastdistill`, as torchrun -m starts it on several GPUs."""

from .cli import main

if __name__ == "__main__":
    main()
