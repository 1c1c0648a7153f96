"use strict";
// Sorting tables, filtering pairs, re-ordering the heat map. The page is complete without it.
const key = (row, column) => {
  const cell = row.cells[column];
  const own = cell.dataset.key;
  const number = Number(own ?? cell.textContent);
  return Number.isNaN(number) ? (own ?? cell.textContent) : number;
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const sort = (head) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = heads.indexOf(head);
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a, column), key(b, column)) * (down ? -1 : 1));
    table.tBodies[0].append(...rows);
  };
  for (const head of heads) {
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(head); }
    });
  }
}

const pairs = document.getElementById("pairs");
pairs?.addEventListener("change", () => {
  for (const article of document.querySelectorAll("article")) {
    const more = article.closest("details");
    if (more && pairs.value !== "") more.open = true;
    article.hidden = pairs.value !== "" && article.dataset.domain !== pairs.value;
  }
});

const heat = document.getElementById("heat");
if (heat) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = [...heat.querySelectorAll("g.row")].map((group) => [...group.querySelectorAll("rect")]);
  const [colour, order] = ["domain", "order"].map((id) => document.getElementById(id));
  const paint = () => {
    rows.forEach((cells, layer) => {
      const places = data.orders[order.value]?.[layer] ?? cells.map((_, index) => index);
      places.forEach((expert, place) => {
        const cell = cells[expert];
        const inset = cell.width.baseVal.value > 0.5 ? 0.04 : 0.3;
        cell.setAttribute("x", place + inset);
        const frame = cell.classList.contains("framed") ? " framed" : "";
        cell.setAttribute("class", `h${data.colours[colour.value][layer][expert]}${frame}`);
      });
    });
  };
  colour.addEventListener("change", paint);
  order.addEventListener("change", paint);
}
