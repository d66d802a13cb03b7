"Read the package's metadata from settings.ini, the one place where it is said."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
meta = settings["DEFAULT"]
lib = meta["lib_name"]


def lines(name): return [line.strip() for line in meta[name].splitlines() if line.strip()]


def own(section):
    "The keys of `section` without those that ConfigParser inherits from DEFAULT."
    return {k: v for k, v in settings[section].items() if k not in meta}


def lists(section): return {k: [item.strip() for item in v.split(",")] for k, v in own(section).items()}


setup(
    description=meta["description"],
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"].split(),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    install_requires=lines("requirements"),
    extras_require={**lists("extras"), "dev": lines("dev_requirements")},
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data=lists("package_data"),
    entry_points={
        "console_scripts": [f"{name}={target}" for name, target in own("console_scripts").items()],
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
