"""The parts of :mod:`mindpet.train.compare`: plan, splits, cells and what runs them, search, tables, picture."""
