"use strict";
// Printed, the page has what is folded away.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
