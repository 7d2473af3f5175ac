"""Print the lowest versions that pyproject.toml allows of what sktransfer needs, as pip takes them.

torch and torchvision are left out: they take gigabytes, and come with the newest ones.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("torch", "torchvision")
OF_THE_LOWEST = ["pytz>=2020.1"]  # of pandas 2; the newest pandas, which is installed, needs none

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# pyarrow, which pandas imports where it is installed, has to fit to NumPy.
needed = [*project["dependencies"], *project["optional-dependencies"]["demo"], *OF_THE_LOWEST]
for dependency in needed:
    name, _, version = dependency.partition(">=")
    if version and name not in LEFT_OUT:
        print(f"{name}=={version}")
