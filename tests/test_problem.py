"""The window of a Config against its definition, and what _problem's types promise."""

import itertools

import jax
import jax.numpy as jnp

from jax_fa3._problem import Config, Masks, fold_window


def test_fold_window():
    """Row i sees j by the arguments exactly if it does by the folded window."""
    sizes = [None, (0, 0), (2, 0), (0, 3), (1, 2)]
    for size, causal, offset in itertools.product(sizes, (False, True), (-3, 0, 2, 10**25)):
        left, right = fold_window(size, causal, offset)
        for i, near in itertools.product(range(6), range(-8, 9)):
            for j in (i + near, i + offset + near):
                seen = not causal or j <= i + offset
                if size is not None:
                    seen = seen and i + offset - size[0] <= j <= i + offset + size[1]
                folded = (left is None or i - left <= j) and (right is None or j <= i + right)
                assert seen == folded, (size, causal, offset, i, j)


def test_run_time_offset_is_not_folded():
    assert fold_window((3, 5), True, None) == (3, 0)


def test_masks_are_a_pytree():
    masks = Masks(key_end=jnp.zeros((1, 4), jnp.int32))
    assert len(jax.tree.leaves(masks)) == 1
    assert jax.tree.map(lambda x: x + 1, masks).key_end.sum() == 4


def test_config_is_static():
    config = Config(0.125, (None, 10**30), None, False)
    assert config == Config(0.125, (None, 10**30), None, False)
    assert hash(config) == hash(Config(0.125, (None, 10**30), None, False))
