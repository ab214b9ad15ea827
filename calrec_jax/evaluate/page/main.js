// Reads the embedded data and draws each section.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
renderHeader(report);
renderResults(report);
renderTraining(report);
renderData(report);
renderCost(report);
renderUsers(report);
renderProvenance(report);
