"""Everything that is to be checked and measured on a GPU, by one command in parts of bounded time.

``case.py`` says what a case is, ``parts.py`` lists them, ``run.py`` is the flow. A case's own code
(``first_light.py``, ``suite.py``, ``speed.py``, ``host_time.py``, ``training.py``, ``offload.py``)
runs in a process of its own, ``child.py``, and appends what it finds to DIR/results.jsonl
(``store.py``); ``report.py`` turns that into tables.
"""
