"""MuSiQue with Unsloth: `python examples/train_musique_unsloth.py train --datasets "path,name,split;..."`."""

from musique_commands import main

if __name__ == "__main__":
    main("unsloth")
