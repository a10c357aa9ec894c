"""MuSiQue with transformers and PEFT: `python examples/train_musique.py train --datasets "path,name,split;..."`."""

from musique_commands import main

if __name__ == "__main__":
    main("hf")
