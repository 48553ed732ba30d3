"""Speed of ``lstm_ext.LSTM`` beside ``torch.nn.LSTM`` and others: ``python -m bench --help``.

Who knows what, each module only those above it:

* ``suites``      the problems, as data, and the arithmetic each one needs
* ``records``     JSON lines on disk: what all tables, plots and comparisons are made from
* ``machine``     what timings depend on
* ``work``        what a row runs, and whether it computes what nn.LSTM computes
* ``timing``      interleaved timing of several modules
* ``peers``       other LSTMs
* ``limits``, ``floor``             what a step costs at least on a GPU
* ``cpu_limits``, ``gpu_limits``    what a processor can do at most
* ``roofline``    what a call costs at least
* ``report``      a row as it is written and printed
* ``run``         the command that measures; ``__main__`` names the others
* ``plots``, ``markdown``, ``compare``, ``gate``, ``publish``  commands on records
* ``plans``, ``variants``           measurements of their own
"""
