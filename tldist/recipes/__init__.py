"""Recipes: functions that return a complete RunConfig for one data set, the expected result written on top."""

from __future__ import annotations

from collections.abc import Callable

from tldist.config import RunConfig, UserError, nearest
from tldist.recipes.cifar10 import cifar10
from tldist.recipes.demo import demo, demo_source
from tldist.recipes.digits import digits
from tldist.recipes.folder import folder
from tldist.recipes.hymenoptera import hymenoptera
from tldist.recipes.imagenet import imagenet
from tldist.recipes.mnist import mnist
from tldist.recipes.mnist_m import mnist_m

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (folder, hymenoptera, cifar10, mnist, mnist_m, digits, imagenet, demo, demo_source)
}


def recipe(name: str) -> RunConfig:
    """The named recipe's config. Raises UserError, with the nearest name, for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'{nearest(name, RECIPES)}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]()
