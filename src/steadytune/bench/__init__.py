"""Studies: many comparable runs with one record each, their statistics, and a report.

spec: what a study is and the runs it asks for. store: a folder of records, one run, one file, written once. run: train,
test, record. pool: warm worker processes. study: runs through the pool into the store. stats: means, intervals, paired
tests. report: the records as one page.
"""
