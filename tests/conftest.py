import sys; from pathlib import Path  # noqa: E401,E702
sys.path.insert(0, str(Path(__file__).parent.parent))
