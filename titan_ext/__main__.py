"""`python -m titan_ext`, or under torchrun: torchtitan's command line, on a machine without a GPU too."""

from titan_ext import cpu

cpu.apply()

from torchtitan.train import main  # noqa: E402

if __name__ == "__main__":
    main()
