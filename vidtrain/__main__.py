"""`python -m vidtrain` is `vidtrain`."""

from vidtrain.cli import main

if __name__ == "__main__":
    main()
