"""All parsers of foreign input.

A new parser gets a line in one of the three tables: a strategy of files near valid ones, and a call of the public
function that reads them, which must end normally or raise a DdoError.
"""

import of_data
import of_runs
import of_weights

TARGETS = (*of_data.TARGETS, *of_weights.TARGETS, *of_runs.TARGETS)
