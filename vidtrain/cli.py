"""The `vidtrain` command: a table of verbs, and nothing heavy until one is chosen."""

from __future__ import annotations

import sys

from vidtrain import __version__

VERBS = {
    "train": "train a model; test=true also tests its best checkpoint",
    "test": "score a checkpoint on many clips of each video",
    "report": "runs/A runs/B [output=report.html]: what they scored, side by side on one page",
    "verify": "test a checkpoint under a recipe's protocol and compare with the published score",
    "predict": "name what is in your videos",
    "extract": "write the features of whole videos, to train on (data=features) or for other tools",
    "summary": "layers, shapes, receptive fields, parameters, multiply-adds",
    "bench": "time decoding, loader, transfer and model on your data; what limits, what to change",
    "data": "action=prepare|check|stats|show|resize|pack: a dataset, its health, looks and speed",
    "completion": "print a completion script: bash, zsh or fish",
}


def usage() -> str:
    """Say what there is, one line a verb."""
    verbs = "\n".join(f"  {verb:<12}{line}" for verb, line in VERBS.items())
    return f"""usage: vidtrain VERB key=value ...

{verbs}

  vidtrain train model=c3d data=ucf101 data.root=/videos/ucf101
  vidtrain train -m model=c3d,slow_fusion optim.lr=0.1,0.01     a sweep
  vidtrain VERB --help                                         its groups and keys
  vidtrain VERB --cfg job                                      its whole config, and stop
  vidtrain VERB --config-dir mine/conf                         your own files go over ours
"""


def main() -> None:
    """Run one verb; exit code 2 for a mistake on the command line."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if args else 2)
    if args[0] in ("-V", "--version"):
        print(f"vidtrain {__version__}")
        sys.exit(0)
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"vidtrain: no verb '{verb}'{hint} (one of: {', '.join(VERBS)})", file=sys.stderr)
        sys.exit(2)
    if verb in ("completion", "report"):  # whose words are no config's
        from importlib import import_module

        sys.exit(import_module(f"vidtrain.commands.{verb}").main(rest))
    from vidtrain import config

    try:
        config.run(verb, rest)
    except BrokenPipeError:  # `vidtrain train --help | head`
        sys.stdout = None
        sys.exit(0)
