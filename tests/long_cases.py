"""Cases of many blocks, beside the table of cases.py."""

import numpy as np
from cases import CAUSAL, Case
from masks import chunked, documents, ints, key_lengths, packed, prefix_lm, scattered


def _long() -> list[Case]:
    """Many tiles a row: for the GPU, where whole tiles are skipped or left unmasked."""
    text = documents(300, 17, 700, 1, 640, 390)  # 2048 in all
    texts = documents(300, 1700, 1, 1200, 1299)
    begin = np.arange(4500, dtype=np.int32)[None, ::-1]
    backwards = {"key_begin": begin, "key_end": begin + 70}
    masks = {
        "full": {},
        "causal": CAUSAL,
        "window": {"local_window_size": (300, 0)},
        "window both ways": {"local_window_size": (150, 200)},
        "offset": {"is_causal": True, "query_offset": ints(-500)},
        "documents": {**packed(text), **CAUSAL},
        "documents, full": packed(text),
        "prefix-LM": prefix_lm(2048, 700),
        "chunked": chunked(1, 2048, 500),
        "any intervals": scattered(1, 2048, 2048),
        "lengths": {"query_seq_lengths": ints(1500), **key_lengths(1111)},
    }
    dims = [64, 128, 256, 192, 96]
    return [
        Case(f"long, {name}", 2048, 2048, 8, 2, dims[i % 5], B=1, mask=mask)
        for i, (name, mask) in enumerate(masks.items())
    ] + [
        Case("long, 192 and 128", 1500, 3000, 4, 4, 192, 128, mask=CAUSAL),
        Case("long, 80", 2048, 2048, 8, 2, 80, B=1),
        Case("long, 80, documents", 2048, 2048, 8, 2, 80, B=1, mask=masks["documents"]),
        Case("long, 72, window", 1500, 2048, 4, 4, 72, B=1, mask=masks["window"]),
        Case("longer, window", 4500, 4500, 2, 2, 128, B=1, mask=masks["window"]),
        Case("longer, any intervals", 4500, 4500, 4, 2, 64, B=1, mask=scattered(1, 4500, 4500)),
        Case("longer, backwards", 4500, 4500, 2, 2, 256, B=1, mask=backwards),
        Case("longer, documents", 4500, 4500, 2, 1, 80, B=1, mask={**packed(texts), **CAUSAL}),
        Case("5 keys more than eight blocks", 1029, 1029, 3, 3, 128, B=1),
        # With sinks, for then rows are not shared by several CTAs.
        Case("24 long blocks", 300, 4224, 2, 2, 128, B=1, sinks=(0.5, -1.0)),
        Case("46 long blocks and 96 keys", 130, 8192, 2, 1, 128, B=1, sinks=(2.0, 0.0)),
        # Tiles of several heads a CTA, whose keys are one block.
        Case("77 keys of many rows", 1700, 77, 8, 8, 64, B=4),
        Case("80 keys of groups", 1100, 80, 12, 4, 64, B=3),
        Case("1 key of narrow heads", 1800, 1, 8, 2, 40, B=3),
        Case("33 keys, soft cap, sinks", 900, 33, 8, 2, 64, logits_soft_cap=4.0, sinks=(1.0,) * 8),
        Case("long, 96, causal", 2048, 2048, 8, 8, 96, B=1, mask=CAUSAL),
    ]


LONG = _long()
