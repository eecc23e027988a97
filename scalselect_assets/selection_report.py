NAME = "selection_report"
