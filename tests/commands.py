"""The commands and modules of the project, from its files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "lowrank_tokens common encoders heads training figures experiments".split()
MODULES = sorted(path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py"))


def module_name(path: Path) -> str:
    """Return the name under which a script is imported: experiments.report."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SCRIPTS = [module_name(path) for path in MODULES if "def get_args_parser" in path.read_text()]
