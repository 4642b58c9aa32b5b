"""Evaluation reports: `report.json` (schema fid_report/v1), and `report.html` rendered from it alone."""
