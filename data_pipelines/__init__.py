"""Data selection and deduplication over shards of any size.

Methods, one file each (`select.NAME` is `NAME.py`), declared by `@stage`; what a selector must define is in `selector.py`.

What all selectors share, in the order in which it happens (`passes.py` runs it):

    reading      shards.py (files to shards), split.py (large files), chunks.py, stream.py (rows as a selector sees them)
    fitting      feature_files.py, fit.py, guard.py
    scoring      scores.py (one table a shard), texts.py (words, bytes), filters.py
    picking      budget.py, pick.py (cutting an order), orders.py, targets.py (several targets), ranking.py, choice.py (quotas)
    writing      figures.py (what is reported), write.py
    who does it  engine.py (one process or a pool), meter.py (progress), parts.py (atomic files), cluster.py (datatrove)
    from Python  door.py
"""
