"""`python -m sae COMMAND` is `sae COMMAND`, so that torchrun can start it: `torchrun --nproc-per-node 2 -m sae COMMAND`."""

from importlib.metadata import entry_points

if __name__ == "__main__":
    # the installed command, which belongs to a package above this one
    next(iter(entry_points(group="console_scripts", name="sae"))).load()()
