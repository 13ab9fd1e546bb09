"""Compare two models by a crosscoder of both: relative norms, latent scaling, examples, as JSON and a page."""

from steering.command_line import main

if __name__ == "__main__":
    main("diff-models")
