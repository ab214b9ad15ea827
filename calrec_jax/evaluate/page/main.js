// Reads the embedded data and draws each section; the single users' data are unpacked when the rest is on the screen.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
renderHeader(report);
renderResults(report);
renderComparisons(report);
renderSlices(report);
renderLists(report);
renderGeneration(report);
renderTraining(report);
renderData(report);
renderCost(report);
renderConfigs(report);
renderProvenance(report);
unpack("users-data").then((packed) => renderUsers({ ...report, ...packed }))
  .catch((error) => replace(byId("users-body"), notice(`The data of single users could not be unpacked (${error.message}); it needs a browser of 2023 or later.`)));
