"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;

  // What of a layout depends on the theme, as plotly's flat update; the colours are the page's own.
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const update = {
      "font.color": color("--text"),
      "hoverlabel.bgcolor": color("--surface"),
      "hoverlabel.bordercolor": color("--line"),
      "hoverlabel.font.color": color("--text"),
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        update[key + ".gridcolor"] = color("--grid");
        update[key + ".linecolor"] = color("--line");
        if (layout[key].zeroline) update[key + ".zerolinecolor"] = color("--muted");
      }
    }
    (layout.annotations || []).forEach((_, index) => {
      update["annotations[" + index + "].font.color"] = color("--text");
    });
    return update;
  }

  const config = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  for (const [id, figure] of Object.entries(figures)) {
    const element = document.getElementById(id);
    // A finger that drags over a plot scrolls the page.
    if (touch) figure.layout.dragmode = false;
    Plotly.newPlot(element, figure.data, figure.layout, config).then(() => Plotly.relayout(element, themed(element.layout)));
    dark.addEventListener("change", () => Plotly.relayout(element, themed(element.layout)));
  }

  function sortBy(table, index, descending) {
    const key = (row) => {
      const value = row.cells[index].dataset.value;
      return value === undefined ? null : Number(value);
    };
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is undefined comes last
      return descending ? y - x : x - y;
    });
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(table, index, descending);
      });
    });
  }
})();
