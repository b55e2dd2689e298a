"""Studies: many runs that can be compared, one record each, statistics that hold, a report to read.

spec: what a study is and the runs it asks for. store: a folder of records, one run, one file, written once. run: train,
test, record. pool: warm worker processes. study: runs through the pool into the store. stats: means, intervals, paired
tests. report: the records as one page.
"""
