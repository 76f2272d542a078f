"use strict";
document.documentElement.classList.add("js");

// Tooltips: browsers show <title> and title="" slowly and not on touch, so they are moved into one quick box.
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg title")) {
  title.parentNode.setAttribute("data-tip", title.textContent);
  title.remove();
}
for (const element of document.querySelectorAll("[title]")) {
  element.setAttribute("data-tip", element.title);
  element.removeAttribute("title");
}
function place(event) {
  const target = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.getAttribute("data-tip");
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
  const above = event.clientY - box.height - 12;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above > 4 ? above : event.clientY + 18) + "px";
}
document.addEventListener("pointermove", place);
document.addEventListener("pointerdown", place);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);

// Arms: a legend entry switches its arm off and on in every chart.
for (const box of document.querySelectorAll(".chip input")) {
  const apply = () => {
    box.parentNode.classList.toggle("off", !box.checked);
    for (const mark of document.querySelectorAll("svg.chart g." + box.dataset.arm)) {
      mark.classList.toggle("hidden", !box.checked);
    }
  };
  box.addEventListener("change", apply);
  apply();
}

// Tables: a click on a column's title sorts every block by it, a second click turns the order round.
function sort(table, column, ascending) {
  const key = (row) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort === undefined ? cell.textContent : cell.dataset.sort;
    const number = text === "" ? Infinity * (ascending ? 1 : -1) : Number(text);
    return Number.isNaN(number) ? text : number;
  };
  const order = ascending ? 1 : -1;
  for (const body of table.tBodies) {
    const rows = Array.from(body.rows).filter((row) => !row.classList.contains("group"));
    rows.sort((a, b) => { const x = key(a), y = key(b); return x < y ? -order : x > y ? order : 0; });
    body.append(...rows);
  }
}
for (const table of document.querySelectorAll("table.sortable")) {
  Array.from(table.tHead.rows[0].cells).forEach((title, column) => {
    title.addEventListener("click", () => {
      const ascending = title.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(table, column, ascending);
    });
  });
}
