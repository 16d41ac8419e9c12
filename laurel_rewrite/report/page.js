"use strict";
// Draws the plots, in the colours of the page: light, dark, and black on white in print.
const places = [...document.querySelectorAll("script[data-plot]")].map((script) => {
  const { data, layout } = JSON.parse(script.textContent);
  return { element: document.getElementById(`plot-${script.dataset.plot}`), data, layout };
});
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
const narrow = () => window.innerWidth < 560;
for (const { element, data, layout } of places) {
  if (narrow()) layout.legend = { ...layout.legend, font: { size: 10 } };
  Plotly.newPlot(element, data, { ...layout, font: { ...layout.font, color: ink(), size: narrow() ? 10 : 13 } }, { responsive: true, displaylogo: false, displayModeBar: false });
}
const recolour = (colour) => places.forEach(({ element }) => Plotly.relayout(element, { "font.color": colour }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => recolour(ink()));
addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((one) => { one.open = true; }); recolour("#000"); });
addEventListener("afterprint", () => recolour(ink()));
