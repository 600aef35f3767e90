"""The built-in domains, drawn: 32 pictures of each.

  python -m domains            in runs/domains/
"""

import dataclasses
from pathlib import Path

from domains import PAINTERS, draw
from plumbing.options import at_least, check_seed, parse, run
from plumbing.pictures import save_grid, to_tensor


@dataclasses.dataclass
class Options:
    size: int = 32
    """Pixels per side."""
    seed: int = 0
    """Of the scenes."""
    output_dir: str = "runs/domains"
    """Where they go."""


def main() -> None:
    options, _ = parse(Options, __doc__)
    at_least(options, size=8)
    check_seed(options)
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for domain in PAINTERS:
        path = out / f"{domain}_{options.size}.png"
        save_grid(path, to_tensor(draw(domain, 32, options.seed, options.size)[0]), columns=8)
        print(path)


if __name__ == "__main__":
    run(main)
