"""`d2m.convert.in_memory.convert` with one flat list of keywords, for tests that change one of them
each."""

import inspect
from dataclasses import fields

from d2m.convert.in_memory import Options, Report, convert
from d2m.plan.presets import recipe_named
from d2m.recipe.recipe import changed

CHANGES = set(inspect.signature(changed).parameters) - {"recipe"}


def converted(dense, out, recipe, batches, importance, **given):
    """given: fields of Options and of Report, keywords of `changed`, progress and log."""

    def taken(names):
        return {name: given.pop(name) for name in list(given) if name in names}

    changes = taken(CHANGES)
    if changes:
        recipe = changed(recipe_named(recipe, dense), **changes)
    records = {
        name: kind(**taken({field.name for field in fields(kind)}))
        for name, kind in (("options", Options), ("report", Report))
    }
    return convert(dense, out, recipe, batches, importance, **records, **given)
