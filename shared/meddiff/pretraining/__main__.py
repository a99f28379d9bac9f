"""`python -m meddiff.pretraining autoencoder|inpainter|publish --out DIR --minutes M`, in this order."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m meddiff.pretraining", description=__doc__)
    parser.add_argument("what", choices=["autoencoder", "inpainter", "publish"])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs, one for all three")
    parser.add_argument("--minutes", type=float, default=35.0, help="training time, interruptions not counted")
    arguments = parser.parse_args()
    if arguments.what == "autoencoder":
        from meddiff.pretraining.autoencoder import train as train_autoencoder

        train_autoencoder(arguments.out / "autoencoder", arguments.minutes)
    elif arguments.what == "inpainter":
        from meddiff.pretraining.inpainter import train as train_inpainter

        train_inpainter(arguments.out, arguments.minutes)
    else:
        from meddiff.pretraining.inpainter import publish
        from meddiff.science.foundation import BUILTIN

        publish(arguments.out, BUILTIN)


if __name__ == "__main__":
    main()
