"""`python -m vidtwin` is `vidtwin`, for launchers that start modules (`torchrun -m vidtwin fit ...`)."""

from vidtwin.cli import entry_point

if __name__ == "__main__":
    entry_point()
