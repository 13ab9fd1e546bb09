"""`python -m sae COMMAND` is `sae COMMAND`, so that torchrun can start it: `torchrun --nproc-per-node 2 -m sae COMMAND`."""

from steering.command_line import main

if __name__ == "__main__":
    main()
