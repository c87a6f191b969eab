"""vidtrain: train and test video models from the command line.

Importing this package imports nothing heavy, so that `vidtrain --help` answers at once.
"""

__version__ = "0.1.0"
